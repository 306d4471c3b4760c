"""Weights that are copied into a GPU's memory; the driver's calls are stood in for, over host memory."""

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import create_memfd
from prism.gpu_worker.engine import bounced_copies, cuda_arena, cuda_driver, registered_image
from prism.gpu_worker.engine.cuda_arena import CudaArena
from prism.gpu_worker.engine.registered_image import RegisteredImage

PAGE = 1 << 16
PIECE = 2 * PAGE
NBYTES = 9 * PIECE + 100


class FakeDriver:
    """Host memory in place of the GPU's. A copy is done when somebody waits for an event behind it, or for
    the stream; `room` bytes can be mapped. `waits` are the events that were waited for on a stream."""

    def __init__(self) -> None:
        self.room = 1 << 40
        self.mapped: dict[int, int] = {}
        self.enqueued: list[tuple[int, int, int]] = []
        self.events: dict[int, int] = {}
        self.waits: list[int] = []
        self.registered: set[int] = set()
        self.timed: set[int] = set()
        self._ranges: list[mmap.mmap] = []
        self._made = 0
        self._lock = threading.Lock()

    def granularity(self, device: int) -> int:
        return PAGE

    def reserve_addresses(self, nbytes: int) -> int:
        self._ranges.append(mmap.mmap(-1, nbytes))
        return ctypes.addressof((ctypes.c_char * nbytes).from_buffer(self._ranges[-1]))

    def fill_words(self, target: int, word: int, nbytes: int) -> None:
        assert self.mapped[target] == nbytes

    def map_memory(self, device: int, address: int, nbytes: int) -> int:
        if sum(self.mapped.values()) + nbytes > self.room:
            raise PrismError(ErrorCode.OUT_OF_MEMORY, "the GPU is full")
        self.mapped[address] = nbytes
        return address

    def unmap_memory(self, address: int, nbytes: int, handle: int) -> None:
        assert self.mapped.pop(address) == nbytes

    def current_context(self) -> str:
        return "primary"

    def use_context(self, context: str) -> None:
        assert context == "primary"

    def register_host(self, address: int, nbytes: int) -> None:
        self.registered.add(address)

    def unregister_host(self, address: int) -> None:
        self.registered.remove(address)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        assert any(begin <= target and target + nbytes <= begin + size for begin, size in self.joined())
        with self._lock:
            self.enqueued.append((target, source, nbytes))

    def joined(self) -> list[tuple[int, int]]:
        """Ranges with memory behind them, neighbours as one."""
        found: list[tuple[int, int]] = []
        for address in sorted(self.mapped):
            if found and sum(found[-1]) == address:
                found[-1] = (found[-1][0], found[-1][1] + self.mapped[address])
            else:
                found.append((address, self.mapped[address]))
        return found

    def create_event(self, *, timed: bool = False) -> int:
        self._made += 1
        self.events[self._made] = 0
        if timed:
            self.timed.add(self._made)
        return self._made

    def record_event(self, event: int, stream: int) -> None:
        self.events[event] = len(self.enqueued)

    def wait_for_event(self, event: int) -> None:
        self.copy_until(self.events[event])

    def seconds_between(self, first: int, last: int) -> float:
        assert {first, last} <= self.timed
        return float(self.events[last] - self.events[first])

    def hold_back(self, stream: int, event: int) -> None:
        self.waits.append(self.events[event])

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def copy_until(self, count: int) -> None:
        """Have the first `count` copies done."""
        with self._lock:
            for index, (target, source, nbytes) in enumerate(self.enqueued[:count]):
                ctypes.memmove(target, source, nbytes)
                self.enqueued[index] = (target, source, 0)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    for call in (name for name in vars(FakeDriver) if not name.startswith("_")):
        if hasattr(cuda_driver, call):
            monkeypatch.setattr(cuda_driver, call, getattr(fake, call))
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: fake.copy_until(len(fake.enqueued)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=8))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda_arena, "REMAPPED_BYTES", PIECE)
    monkeypatch.setattr(registered_image, "CHUNK_BYTES", PIECE)
    monkeypatch.setattr(bounced_copies, "BUFFER_BYTES", PAGE)
    return fake


@pytest.fixture
def image(driver: FakeDriver) -> Iterator[RegisteredImage]:
    fd = create_memfd("test-image", NBYTES)
    os.pwrite(fd, bytes(index * 7 % 251 for index in range(NBYTES)), 0)
    made = RegisteredImage(fd, NBYTES)
    os.close(fd)
    yield made
    made.close()


def arena_of(driver: FakeDriver) -> CudaArena:
    """One that has been built, and sleeps."""
    arena = CudaArena(0, NBYTES)
    arena.used = NBYTES
    return arena


def pinned(image: RegisteredImage) -> RegisteredImage:
    """The same image, all of it pinned."""
    for _ in image.pinned_pieces():
        pass
    return image


def content(arena: CudaArena) -> bytes:
    return ctypes.string_at(arena.address, NBYTES)


def test_what_was_pinned_is_copied_piece_by_piece_and_can_be_waited_for_so(
    driver: FakeDriver, image: RegisteredImage
) -> None:
    arena = arena_of(driver)
    arrivals = arena.begin_copy_in(pinned(image), NBYTES)
    assert len(driver.enqueued) == 10
    # As much again each time, the rest at last.
    assert list(driver.mapped.values()) == [PIECE, PIECE, 2 * PIECE, 4 * PIECE, PIECE + PAGE]
    arrivals.hold_back(1)
    arrivals.hold_back(3 * PIECE)
    arrivals.hold_back(3 * PIECE + 1)
    arrivals.hold_back(NBYTES)
    assert driver.waits == [1, 3, 4, 10]
    arrivals.wait()
    assert content(arena) == ctypes.string_at(image.address, NBYTES)
    assert arrivals.seconds == 10
    arrivals.close()
    assert not driver.events


def test_what_is_not_pinned_is_all_waited_for(
    driver: FakeDriver, image: RegisteredImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_arena, "bouncing_threads", lambda: 3)
    arena = arena_of(driver)
    arrivals = arena.begin_copy_in(image, NBYTES)
    arrivals.hold_back(1)
    assert driver.waits == [len(driver.enqueued)]
    arrivals.wait()
    assert content(arena) == ctypes.string_at(image.address, NBYTES)
    arrivals.close()
    assert not driver.events
    assert not driver.registered


def test_a_gpu_without_room_ends_what_was_begun(driver: FakeDriver, image: RegisteredImage) -> None:
    driver.room = 5 * PIECE
    arena = arena_of(driver)
    with pytest.raises(PrismError, match="the GPU is full"):
        arena.begin_copy_in(pinned(image), NBYTES)
    assert not driver.events
    assert all(nbytes == 0 for _, _, nbytes in driver.enqueued)
    arena.unmap()
    assert not driver.mapped
    driver.room = 1 << 40
    arena.copy_in(image, NBYTES)
    assert content(arena) == ctypes.string_at(image.address, NBYTES)


def test_small_tensors_lie_in_front_however_late_they_come(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_arena, "MOST_IN_FRONT_BYTES", PAGE // 2)
    monkeypatch.setattr(CudaArena, "view", lambda arena, offset, *_: SimpleNamespace(offset=offset))
    arena = CudaArena(0, 40 * PIECE, front_bytes=PAGE)

    def offset(nbytes: int, place: Callable[..., Any]) -> int:
        return int(place((nbytes // 2,), torch.bfloat16).offset)

    assert offset(PIECE, arena.place) == PAGE
    assert offset(200, arena.place_in_front) == 0
    assert offset(PIECE, arena.place) == PAGE + PIECE
    assert offset(PAGE // 2, arena.place_in_front) == 256
    # Too large to lie there, then no more room there.
    assert offset(PAGE // 2 + 2, arena.place_in_front) == PAGE + 2 * PIECE
    assert offset(PAGE // 2, arena.place_in_front) == PAGE + 2 * PIECE + PAGE // 2 + 256
    assert arena.used == PAGE + 2 * PIECE + PAGE + 256
