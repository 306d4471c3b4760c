"""How many engines of a GPU may decode at once for each to keep its promise.

Engines that compute at once take turns, so a decode step of one among k takes about k times what it takes
alone, and what prefill takes of the GPU comes on top: k * s / (1 - p) <= T for every engine with a step of s
seconds and a promise of T seconds a token, where p is the share that prefill had lately. One more request in
a batch costs little; one more engine costs everybody a k-th. So requests for an engine that runs nothing are
those that may have to wait, for an engine to run dry. A promise that its engine can't keep even alone is lost
whoever waits, so it holds nobody back.
"""

from collections.abc import Mapping

from prism.scheduling.admission.policy import PREFILL_WINDOW_S, EngineCapacity, GpuWork

MOST_PREFILL_SHARE = 0.5


class DecodeRoom:
    """Kept up to date while requests are released, in one decision. `working` engines run something;
    `tightest` is the largest share that a step of one of them alone takes of what it was promised, of those
    that can keep their promise alone."""

    __slots__ = ("_share", "tightest", "working")

    def __init__(self, engines: Mapping[str, EngineCapacity], gpu: GpuWork) -> None:
        self._share = 1.0 - min(MOST_PREFILL_SHARE, gpu.recent_prefill_s / PREFILL_WINDOW_S)
        working = 0
        tightest = 0.0
        for engine in engines.values():
            if engine.running:
                working += 1
                tightest = max(tightest, _share(engine))
        self.working = working
        self.tightest = tightest

    def begins(self, engine: EngineCapacity) -> None:
        """It has work from now on."""
        self.working += 1
        self.tightest = max(self.tightest, _share(engine))

    def has_room(self, engine: EngineCapacity, kept_free: int = 0) -> bool:
        """Whether `engine`, which runs nothing, may begin, and `kept_free` others after it. The first may."""
        if not self.working:
            return True
        tightest = max(self.tightest, _share(engine))
        return (self.working + 1 + kept_free) * tightest <= self._share

    @property
    def too_many(self) -> int:
        """By how many more engines work than can keep their promises together."""
        together = self.working
        while together > 1 and together * self.tightest > self._share:
            together -= 1
        return self.working - together


def _share(engine: EngineCapacity) -> float:
    share = engine.decode_alone_s / engine.tpot_slo_s
    return share if share <= 1.0 else 0.0
