"""Copies by way of pinned buffers; the driver's calls are stood in for by copies in host memory."""

import ctypes
import mmap
import threading
from typing import Any

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import bounced_copies as module
from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.bounced_copies import bounced_copies, bounced_copies_out, bouncing_threads

BUFFER = 1 << 16
NBYTES = 40 * BUFFER + 4096


class FakeDriver:
    """Fetches from a buffer only when somebody waits for the event that was recorded after it, so that a
    buffer that is written over too early shows in what arrives."""

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.pending: list[tuple[int, int, int]] = []
        self.lock = threading.Lock()
        self.fails_after = -1
        self.copies = 0
        self.events = 0

    def current_context(self) -> str:
        return "primary"

    def use_context(self, context: str) -> None:
        assert context == "primary"

    def register_host(self, address: int, nbytes: int) -> None:
        self.registered.add(address)

    def unregister_host(self, address: int) -> None:
        self.registered.remove(address)

    def create_event(self) -> list[int]:
        self.events += 1
        return []

    def destroy_event(self, event: list[int]) -> None:
        self.events -= 1

    def record_event(self, event: list[int], stream: int) -> None:
        with self.lock:
            event[:] = [len(self.pending)]

    def wait_for_event(self, event: list[int]) -> None:
        with self.lock:
            for index in range(event[0] if event else 0):
                target, source, nbytes = self.pending[index]
                ctypes.memmove(target, source, nbytes)
                self.pending[index] = (target, source, 0)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        with self.lock:
            self.copies += 1
            if self.copies == self.fails_after:
                raise PrismError(ErrorCode.INTERNAL, "the bus is gone")
            self.pending.append((target, source, nbytes))

    copy_to_host = copy_to_device


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    for call in (name for name in vars(FakeDriver) if not name.startswith("_")):
        monkeypatch.setattr(cuda_driver, call, getattr(fake, call))
    monkeypatch.setattr(module, "BUFFER_BYTES", BUFFER)
    return fake


def buffers() -> tuple[Any, Any]:
    source = (ctypes.c_char * NBYTES).from_buffer(bytearray(index * 7 % 251 for index in range(NBYTES)))
    return source, (ctypes.c_char * NBYTES)()


@pytest.mark.parametrize("threads", [1, 5])
def test_everything_arrives_and_nothing_stays_pinned(driver: FakeDriver, threads: int) -> None:
    source, target = buffers()
    half = 20 * BUFFER + 100
    with bounced_copies(threads, 7) as copy:
        copy(ctypes.addressof(target), ctypes.addressof(source), half)
        copy(ctypes.addressof(target) + half, ctypes.addressof(source) + half, NBYTES - half)
    assert target.raw == source.raw
    assert not driver.registered
    assert driver.events == 0


def test_a_copy_that_fails_is_told_of_and_nothing_stays_pinned(driver: FakeDriver) -> None:
    source, target = buffers()
    driver.fails_after = 5
    with pytest.raises(PrismError, match="the bus is gone"), bounced_copies(3, 7) as copy:
        copy(ctypes.addressof(target), ctypes.addressof(source), NBYTES)
    assert not driver.registered
    assert driver.events == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bounce")]


@pytest.mark.parametrize("threads", [1, 5])
def test_everything_comes_out_into_memory_that_was_not_there(driver: FakeDriver, threads: int) -> None:
    source, _ = buffers()
    with mmap.mmap(-1, NBYTES) as target:
        view = (ctypes.c_char * NBYTES).from_buffer(target)
        with bounced_copies_out(7, threads) as copy:
            copy(ctypes.addressof(view), ctypes.addressof(source), NBYTES)
        assert view.raw == source.raw
        del view
    assert not driver.registered
    assert driver.events == 0


def test_only_its_own_buffers_are_pinned_while_an_image_comes_out(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = buffers()
    pinned: list[int] = []
    register = driver.register_host

    def registering(address: int, nbytes: int) -> None:
        pinned.append(nbytes)
        register(address, nbytes)

    monkeypatch.setattr(cuda_driver, "register_host", registering)
    with bounced_copies_out(7, 3) as copy:
        copy(ctypes.addressof(target), ctypes.addressof(source), NBYTES)
    assert target.raw == source.raw
    assert pinned == [BUFFER] * len(pinned)
    assert 1 <= len(pinned) <= 3


def test_a_host_without_memory_for_what_comes_out_says_so(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(address: int, nbytes: int) -> None:
        if nbytes < BUFFER:
            raise PrismError(ErrorCode.OUT_OF_MEMORY, "no host memory for the image")

    monkeypatch.setattr(module, "populate", none)
    source, target = buffers()
    with pytest.raises(PrismError, match="no host memory"), bounced_copies_out(7) as copy:
        copy(ctypes.addressof(target), ctypes.addressof(source), NBYTES)
    assert not driver.registered


@pytest.mark.parametrize(("cores", "threads"), [(1, 0), (7, 0), (8, 6), (16, 14), (128, 14)])
def test_few_cores_pin_and_some_are_left_to_others(cores: int, threads: int) -> None:
    assert bouncing_threads(cores) == threads
