"""The driver's copies, stood in for by copies in host memory."""

import ctypes
import threading

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import cuda_driver


class HostDriver:
    """One stream. A copy is done only when somebody waits for an event behind it, or for all: a buffer that
    is written over too early shows in what arrives. The copy numbered `fails_at`, from 1, fails.

    `registered` is what is pinned; `events` are those not given back, with the copies before each; `waits`
    are the copies that streams were held back for.
    """

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.enqueued: list[tuple[int, int, int]] = []
        self.events: dict[int, int] = {}
        self.timed: set[int] = set()
        self.waits: list[int] = []
        self.fails_at = -1
        self._made = 0
        self._lock = threading.Lock()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the calls of `cuda_driver`."""
        for call in vars(cuda_driver):
            if hasattr(self, call):
                monkeypatch.setattr(cuda_driver, call, getattr(self, call))

    def current_context(self) -> str:
        return "primary"

    def use_context(self, context: str) -> None:
        assert context == "primary"

    def register_host(self, address: int, nbytes: int) -> None:
        self.registered.add(address)

    def unregister_host(self, address: int) -> None:
        self.registered.remove(address)

    def create_event(self, *, timed: bool = False) -> int:
        with self._lock:
            self._made += 1
            self.events[self._made] = 0
            if timed:
                self.timed.add(self._made)
            return self._made

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record_event(self, event: int, stream: int) -> None:
        with self._lock:
            self.events[event] = len(self.enqueued)

    def wait_for_event(self, event: int) -> None:
        self.copy_until(self.events[event])

    def hold_back(self, stream: int, event: int) -> None:
        self.waits.append(self.events[event])

    def seconds_between(self, first: int, last: int) -> float:
        """A copy takes a second."""
        assert {first, last} <= self.timed
        return float(self.events[last] - self.events[first])

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        with self._lock:
            if len(self.enqueued) + 1 == self.fails_at:
                raise PrismError(ErrorCode.INTERNAL, "the bus is gone")
            self.enqueued.append((target, source, nbytes))

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        HostDriver.copy_to_device(self, target, source, nbytes, stream)

    def copy_until(self, count: int) -> None:
        """Have the first `count` copies done."""
        with self._lock:
            for index, (target, source, nbytes) in enumerate(self.enqueued[:count]):
                ctypes.memmove(target, source, nbytes)
                self.enqueued[index] = (target, source, 0)

    def copy_all(self) -> None:
        """Have every copy done."""
        self.copy_until(len(self.enqueued))
