"""Simulated time: what happens next."""

from collections.abc import Callable
from heapq import heappush
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism.bench.simulation.engine import Engine

Happening = Callable[[float], Any]


class EventQueue:
    """Events by time; what was put in first comes first among equals.

    `heap` holds (time, number, what, engine, version): either `what` is called with the time, or it is None
    and an engine has come to the end of what it does, unless its version has moved on since.
    """

    __slots__ = ("heap", "number")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Happening | None, Engine | None, int]] = []
        self.number = count().__next__

    def at(self, time: float, what: Happening) -> None:
        """Have `what` called at `time`."""
        heappush(self.heap, (time, self.number(), what, None, 0))
