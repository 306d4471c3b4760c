"""How much prefill a GPU has been given: what is left of it, and what it had lately."""

from collections import deque
from typing import NamedTuple

from prism.scheduling.admission.policy import PREFILL_WINDOW_S, GpuWork


class _Released(NamedTuple):
    ends_s: float
    seconds: float
    overaged: bool


class PrefillBacklog:
    """Fed with what is released and with first tokens; keeps no clock: `now` never goes back.

    Prefill that ends earlier than was thought frees the GPU at once. Prefill that takes longer than was
    thought holds nobody up beyond its time: estimates, not engines, bound what is released.
    """

    def __init__(self) -> None:
        self._pending: dict[str, float] = {}
        self._pending_s = 0.0
        self._until_s = 0.0
        self._recent: deque[_Released] = deque()
        self._recent_s = 0.0
        self._recent_overaged_s = 0.0

    def released(self, rid: str, seconds: float, now: float, *, overaged: bool = False) -> None:
        """A request whose prefill takes so many seconds went to its engine."""
        until_s = self._until_s
        self._until_s = (until_s if until_s > now else now) + seconds
        self._pending[rid] = seconds
        self._pending_s += seconds
        self._recent.append(_Released(self._until_s, seconds, overaged))
        self._recent_s += seconds
        if overaged:
            self._recent_overaged_s += seconds

    def prefilled(self, rid: str, now: float) -> None:
        """It had its first token, or is gone; unknown ones are no news."""
        seconds = self._pending.pop(rid, None)
        if seconds is None:
            return
        self._pending_s = self._pending_s - seconds if self._pending else 0.0
        until_s = now + self._pending_s
        if until_s < self._until_s:
            self._until_s = until_s

    def work(self, now: float) -> GpuWork:
        """As of `now`."""
        recent = self._recent
        while recent and recent[0].ends_s <= now - PREFILL_WINDOW_S:
            gone = recent.popleft()
            self._recent_s -= gone.seconds
            if gone.overaged:
                self._recent_overaged_s -= gone.seconds
        if not recent:
            self._recent_s = self._recent_overaged_s = 0.0
        return GpuWork(self._until_s, self._recent_s, self._recent_overaged_s)
