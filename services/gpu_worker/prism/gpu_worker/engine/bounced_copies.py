"""Copies between the GPU and host memory that is not pinned, by way of small buffers that are.

Pinning 16 GB and copying it meanwhile takes 0.68 s on 16 cores, with four threads or with eight; fourteen
threads that copy into pinned buffers from which the GPU fetches do it in 0.38 s (H200; docs/gpu.md). With
few cores pinning is faster. Out of the GPU it is always done so: while a piece is pinned, the driver lets
nothing else of the process through, and the engine is serving then.
"""

import abc
import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.host_pages import populate, prefer_huge_pages

BUFFER_BYTES = 8 << 20
BUFFERS_A_THREAD = 2
LEAST_CORES = 8
MOST_THREADS = 14
SPARED_CORES = 2
# Enough to keep up with what a host writes into new memory, and few beside an engine that serves.
THREADS_OUT = 4

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.restype = ctypes.c_void_p

Copy = Callable[[int, int, int], None]
"""Copy to an address, from another, so many bytes: one of the two is the device's."""


def bouncing_threads(cores: int | None = None) -> int:
    """With how many threads to copy on a host of so many `cores` (default: those that this process may use);
    0 where pinning is faster."""
    count = len(os.sched_getaffinity(0)) if cores is None else cores
    return min(MOST_THREADS, count - SPARED_CORES) if count >= LEAST_CORES else 0


@contextmanager
def bounced_copies(threads: int, stream: int) -> Iterator[Copy]:
    """Gives what enqueues copies to the GPU on `stream`; all are enqueued when this is left, not yet done.

    Raises PrismError with the first copy's that failed, or with why there is no pinned memory.
    """
    with _by_way_of(_LaneIn, threads, stream) as copy:
        yield copy


@contextmanager
def bounced_copies_out(stream: int, threads: int = THREADS_OUT) -> Iterator[Copy]:
    """Gives what copies from the GPU, on `stream`, into host memory that need not be there yet; all is done
    when this is left.

    Raises PrismError with the first copy's that failed, or with why there is no memory.
    """
    with _by_way_of(_LaneOut, threads, stream) as copy:
        yield copy


@contextmanager
def _by_way_of(kind: "type[_Lane]", threads: int, stream: int) -> Iterator[Copy]:
    lanes: list[_Lane] = []
    making = threading.local()
    context = cuda_driver.current_context()

    def carry(target: int, source: int, nbytes: int) -> None:
        lane = getattr(making, "lane", None)
        if lane is None:
            lane = making.lane = kind(stream)
            lanes.append(lane)
        lane.carry(target, source, nbytes)

    pool = ThreadPoolExecutor(threads, "bounce", cuda_driver.use_context, (context,))
    under_way: list[Future[None]] = []

    def copy(target: int, source: int, nbytes: int) -> None:
        for offset in range(0, nbytes, BUFFER_BYTES):
            size = min(BUFFER_BYTES, nbytes - offset)
            under_way.append(pool.submit(carry, target + offset, source + offset, size))

    try:
        yield copy
        for each in under_way:
            each.result()
    finally:
        pool.shutdown(cancel_futures=True)
        with contextlib.ExitStack() as closing:
            for lane in lanes:
                closing.callback(lane.close)


class _Lane(abc.ABC):
    """One thread's pinned buffers, which it uses in turn."""

    buffers: int

    def __init__(self, stream: int) -> None:
        nbytes = BUFFER_BYTES * self.buffers
        self.stream = stream
        self._mapping = mmap.mmap(-1, nbytes)
        self._view = (ctypes.c_char * nbytes).from_buffer(self._mapping)
        self.address = ctypes.addressof(self._view)
        prefer_huge_pages(self.address, nbytes)
        populate(self.address, nbytes)
        cuda_driver.register_host(self.address, nbytes)
        self.events: list[Any] = []

    @abc.abstractmethod
    def carry(self, target: int, source: int, nbytes: int) -> None:
        """Copy `nbytes`, as much as a buffer holds at most."""

    def close(self) -> None:
        """Give the buffers back once the GPU is done with them."""
        for event in self.events:
            cuda_driver.wait_for_event(event)
            cuda_driver.destroy_event(event)
        cuda_driver.unregister_host(self.address)
        del self._view
        self._mapping.close()


class _LaneIn(_Lane):
    """To the GPU, which fetches from one buffer while the next is filled."""

    buffers = BUFFERS_A_THREAD
    _turn = 0

    def carry(self, target: int, source: int, nbytes: int) -> None:
        """Copy into a buffer once the GPU has fetched what was in it, and enqueue that it is fetched."""
        turn = self._turn % self.buffers
        self._turn += 1
        if turn < len(self.events):
            cuda_driver.wait_for_event(self.events[turn])
        else:
            self.events.append(cuda_driver.create_event())
        buffer = self.address + turn * BUFFER_BYTES
        _libc.memcpy(buffer, source, nbytes)
        cuda_driver.copy_to_device(target, buffer, nbytes, self.stream)
        cuda_driver.record_event(self.events[turn], self.stream)


class _LaneOut(_Lane):
    """From the GPU, which fills the buffers of other threads while this one's is emptied."""

    buffers = 1

    def carry(self, target: int, source: int, nbytes: int) -> None:
        """Have the GPU fill the buffer, and copy it to where memory is made for it."""
        if not self.events:
            self.events.append(cuda_driver.create_event())
        cuda_driver.copy_to_host(self.address, source, nbytes, self.stream)
        cuda_driver.record_event(self.events[0], self.stream)
        populate(target, nbytes)
        cuda_driver.wait_for_event(self.events[0])
        _libc.memcpy(target, self.address, nbytes)
