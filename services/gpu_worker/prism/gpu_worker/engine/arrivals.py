"""Weights that are on their way into memory: who computes with some of them waits for no others."""

import bisect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol


class Piece(Protocol):
    """A part of the weights, once its copy has begun."""

    def hold_back(self) -> None:
        """Have what the calling thread computes next begin once this part is there."""

    def wait(self) -> None:
        """Wait until it is there. Raises what its copy failed with."""


class Arrivals:
    """Copies that have begun. `pieces` come in the order of addresses, each with the number of bytes, from
    the first on, that are there once it is. `end` stops what is under way, waits for it and gives back what
    the copies needed; it is called once. `took` tells the seconds from `began` to the last arrival more
    exactly than a thread can that has to be woken for it.

    `wait` may be called by several threads, `hold_back` by others meanwhile, until `close`.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[int, Piece]],
        began: float,
        end: Callable[[], None],
        took: Callable[[], float] | None = None,
    ) -> None:
        self.seconds = 0.0
        self._took = took
        self._ends = [reached for reached, _ in pieces]
        self._pieces = [piece for _, piece in pieces]
        self._began = began
        self._end = end
        self._ended = False
        self._all_here = threading.Event()
        if not pieces:
            self._all_here.set()

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self._ends[-1] if self._ends else 0

    @property
    def all_here(self) -> bool:
        """Whether `wait` has seen the last one arrive."""
        return self._all_here.is_set()

    def hold_back(self, nbytes: int) -> None:
        """Have what the calling thread computes next begin once the first `nbytes` are there."""
        if self._pieces and nbytes > 0 and not self.all_here:
            index = min(bisect.bisect_left(self._ends, nbytes), len(self._pieces) - 1)
            self._pieces[index].hold_back()

    def wait(self, left_s: float = 0.0) -> None:
        """Wait until all are there, or until the rest takes no more than `left_s` seconds, judged by how fast
        the others came. Raises what a copy failed with."""
        if self.all_here:
            return
        for reached, piece in zip(self._ends, self._pieces, strict=True):
            piece.wait()
            elapsed = time.perf_counter() - self._began
            left = self.nbytes - reached
            if left == 0 and not self.all_here:
                self.seconds = self._took() if self._took is not None else elapsed
                self._all_here.set()
            elif left and left * elapsed <= left_s * reached:
                return

    def finish(self) -> None:
        """Wait until all are there, and close whatever comes of it."""
        try:
            self.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Have nothing under way any more, and nothing held for it. Nobody is held back by then."""
        if not self._ended:
            self._ended = True
            self._end()
