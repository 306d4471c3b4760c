"""Copies by way of pinned buffers; the driver's calls are stood in for by copies in host memory."""

import ctypes
import mmap
import threading
from typing import Any

import pytest
from tests.gpu_worker.engine.host_driver import HostDriver

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import bounced_copies as module
from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.bounced_copies import bounced_copies, bounced_copies_out, bouncing_threads

BUFFER = 1 << 16
NBYTES = 40 * BUFFER + 4096


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    fake = HostDriver()
    fake.stand_in(monkeypatch)
    monkeypatch.setattr(module, "BUFFER_BYTES", BUFFER)
    return fake


def buffers() -> tuple[Any, Any]:
    source = (ctypes.c_char * NBYTES).from_buffer(bytearray(index * 7 % 251 for index in range(NBYTES)))
    return source, (ctypes.c_char * NBYTES)()


@pytest.mark.parametrize("threads", [1, 5])
def test_everything_arrives_and_nothing_stays_pinned(driver: HostDriver, threads: int) -> None:
    source, target = buffers()
    half = 20 * BUFFER + 100
    with bounced_copies(threads, 7) as copy:
        copy(ctypes.addressof(target), ctypes.addressof(source), half)
        copy(ctypes.addressof(target) + half, ctypes.addressof(source) + half, NBYTES - half)
    assert target.raw == source.raw
    assert not driver.registered
    assert not driver.events


def test_a_copy_that_fails_is_told_of_and_nothing_stays_pinned(driver: HostDriver) -> None:
    source, target = buffers()
    driver.fails_at = 5
    with pytest.raises(PrismError, match="the bus is gone"), bounced_copies(3, 7) as copy:
        copy(ctypes.addressof(target), ctypes.addressof(source), NBYTES)
    assert not driver.registered
    assert not driver.events
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bounce")]


@pytest.mark.parametrize("threads", [1, 5])
def test_everything_comes_out_into_memory_that_was_not_there(driver: HostDriver, threads: int) -> None:
    source, _ = buffers()
    with mmap.mmap(-1, NBYTES) as target:
        view = (ctypes.c_char * NBYTES).from_buffer(target)
        with bounced_copies_out(7, threads) as copy:
            copy(ctypes.addressof(view), ctypes.addressof(source), NBYTES)
        assert view.raw == source.raw
        del view
    assert not driver.registered
    assert not driver.events


def test_only_its_own_buffers_are_pinned_while_an_image_comes_out(
    driver: HostDriver, monkeypatch: pytest.MonkeyPatch
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
    driver: HostDriver, monkeypatch: pytest.MonkeyPatch
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
