"""How many engines of a GPU may decode at once for each to keep its promise.

Engines that compute at once take turns, so a decode step of one among k takes about k times what it takes
alone, and what prefill takes of the GPU comes on top: k * s / (1 - p) <= T for every engine with a step of s
seconds and a promise of T seconds a token, where p is the share that prefill had lately. One more request in
a batch costs little; one more engine costs everybody a k-th. So requests for an engine that runs nothing are
those that may have to wait, for an engine to run dry.
"""

from collections.abc import Mapping

from prism.scheduling.admission.policy import PREFILL_WINDOW_S, EngineCapacity, GpuWork

MOST_PREFILL_SHARE = 0.5


class DecodeRoom:
    """Kept up to date while requests are released, in one decision. `working` engines run something;
    `tightest` is the largest share that a step of one of them alone takes of what it was promised."""

    __slots__ = ("_share", "tightest", "working")

    def __init__(self, engines: Mapping[str, EngineCapacity], gpu: GpuWork) -> None:
        self._share = 1.0 - min(MOST_PREFILL_SHARE, gpu.recent_prefill_s / PREFILL_WINDOW_S)
        working = 0
        tightest = 0.0
        for engine in engines.values():
            if engine.running:
                working += 1
                share = engine.decode_alone_s / engine.tpot_slo_s
                if share > tightest:
                    tightest = share
        self.working = working
        self.tightest = tightest

    def begins(self, engine: EngineCapacity) -> None:
        """It has work from now on."""
        self.working += 1
        self.tightest = max(self.tightest, engine.decode_alone_s / engine.tpot_slo_s)

    def has_room(self, engine: EngineCapacity, kept_free: int = 0) -> bool:
        """Whether `engine`, which runs nothing, may begin, and `kept_free` others after it. The first may."""
        if not self.working:
            return True
        tightest = max(self.tightest, engine.decode_alone_s / engine.tpot_slo_s)
        return (self.working + 1 + kept_free) * tightest <= self._share

    @property
    def overdrawn(self) -> bool:
        """Whether more engines work than can keep their promises."""
        return self.working > 1 and self.working * self.tightest > self._share
