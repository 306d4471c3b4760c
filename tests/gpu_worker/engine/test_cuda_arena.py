"""Weights that are copied into a GPU's memory; the driver's calls are stood in for, over host memory."""

import ctypes
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.gpu_worker.engine.mapping_driver import PAGE, PIECE, MappingDriver, standing_in

from prism.common.errors import PrismError
from prism.common.memfd import create_memfd
from prism.gpu_worker.engine import cuda_arena
from prism.gpu_worker.engine.cuda_arena import CudaArena
from prism.gpu_worker.engine.registered_image import RegisteredImage

NBYTES = 9 * PIECE + 100


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> MappingDriver:
    return standing_in(monkeypatch)


@pytest.fixture
def image(driver: MappingDriver) -> Iterator[RegisteredImage]:
    fd = create_memfd("test-image", NBYTES)
    os.pwrite(fd, bytes(index * 7 % 251 for index in range(NBYTES)), 0)
    made = RegisteredImage(fd, NBYTES)
    os.close(fd)
    yield made
    made.close()


def arena_of(driver: MappingDriver) -> CudaArena:
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
    driver: MappingDriver, image: RegisteredImage
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
    driver: MappingDriver, image: RegisteredImage, monkeypatch: pytest.MonkeyPatch
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


def test_a_gpu_without_room_ends_what_was_begun(driver: MappingDriver, image: RegisteredImage) -> None:
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
    driver: MappingDriver, monkeypatch: pytest.MonkeyPatch
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
