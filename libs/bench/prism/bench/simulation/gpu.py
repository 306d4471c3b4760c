"""One GPU: who computes on it, its memory, and its way to host memory."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prism.bench.simulation.engine import Engine
    from prism.bench.simulation.instance import Instance


class Gpu:
    """`computing` engines share it evenly, beyond the number that it runs in `parallel`; to one that prefills
    that is `prefill_parallel` (None: the same). Bytes of memory, `reserved_bytes` of `limit_bytes` are
    promised away. `bus_free_s` is when the copies of weights to it that are under way will be done: one goes
    after the other."""

    __slots__ = (
        "active",
        "bus_free_s",
        "busy_s",
        "busy_since",
        "computing",
        "held_s",
        "held_since",
        "index",
        "limit_bytes",
        "parallel",
        "prefill_parallel",
        "reserved_bytes",
        "residents",
    )

    def __init__(
        self, index: int, limit_bytes: int, parallel: float = 1.0, prefill_parallel: float | None = None
    ) -> None:
        self.index = index
        self.limit_bytes = limit_bytes
        self.parallel = parallel
        self.prefill_parallel = parallel if prefill_parallel is None else prefill_parallel
        self.reserved_bytes = 0
        self.residents: dict[str, Instance] = {}
        self.computing: list[Engine] = []
        self.bus_free_s = 0.0
        self.busy_s = 0.0
        self.busy_since = 0.0
        self.active = 0
        self.held_s = 0.0
        self.held_since = 0.0

    @property
    def free_bytes(self) -> int:
        """Memory that nobody has been promised."""
        return self.limit_bytes - self.reserved_bytes

    def shares(self, engines: int) -> float:
        """How many times longer a step takes each of so many engines that compute at once."""
        return max(1.0, engines / self.parallel)

    def prefill_shares(self, engines: int) -> float:
        """How many times longer a prefill takes each of so many engines that compute at once."""
        return max(1.0, engines / self.prefill_parallel)

    @property
    def turns(self) -> float:
        """How many times longer a decode step takes than alone, of each engine that decodes now."""
        decoding = 0
        for engine in self.computing:
            if engine.ends:
                decoding += 1
        return max(1.0, decoding / self.parallel)

    def join(self, engine: "Engine", now: float) -> None:
        """`engine` begins to compute."""
        computing = self.computing
        if computing:
            others = tuple(computing)
            computing.append(engine)
            for other in others:
                other.shared_again(now)
        else:
            computing.append(engine)
            self.busy_since = now

    def leave(self, engine: "Engine", now: float) -> None:
        """`engine` has nothing to compute any more."""
        computing = self.computing
        computing.remove(engine)
        if computing:
            for other in tuple(computing):
                other.shared_again(now)
        else:
            self.busy_s += now - self.busy_since

    def hold(self, now: float) -> None:
        """One more model is active here."""
        if self.active == 0:
            self.held_since = now
        self.active += 1

    def let_go(self, now: float) -> None:
        """One model less is active here."""
        self.active -= 1
        if self.active == 0:
            self.held_s += now - self.held_since

    def settle(self, now: float) -> None:
        """Close the accounts of time at the end."""
        if self.computing:
            self.busy_s += now - self.busy_since
            self.busy_since = now
        if self.active:
            self.held_s += now - self.held_since
            self.held_since = now
