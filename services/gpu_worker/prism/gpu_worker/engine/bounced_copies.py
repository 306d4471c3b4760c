"""Copies to the GPU from host memory that is not pinned, by way of small buffers that are.

Pinning 16 GB and copying it meanwhile takes 0.68 s on 16 cores, with four threads or with eight; fourteen
threads that copy into pinned buffers from which the GPU fetches do it in 0.38 s (H200; docs/gpu.md). With
few cores pinning is faster.
"""

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

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.restype = ctypes.c_void_p

Copy = Callable[[int, int, int], None]
"""Copy to a device address, from a host address, so many bytes."""


def bouncing_threads(cores: int | None = None) -> int:
    """With how many threads to copy on a host of so many `cores` (default: those that this process may use);
    0 where pinning is faster."""
    count = len(os.sched_getaffinity(0)) if cores is None else cores
    return min(MOST_THREADS, count - SPARED_CORES) if count >= LEAST_CORES else 0


@contextmanager
def bounced_copies(threads: int, stream: int) -> Iterator[Copy]:
    """Gives what enqueues copies on `stream`; they are all enqueued when this is left, not yet done.

    Raises PrismError with the first copy's that failed, or with why there is no pinned memory.
    """
    lanes: list[_Lane] = []
    making = threading.local()
    context = cuda_driver.current_context()

    def carry(target: int, source: int, nbytes: int) -> None:
        lane = getattr(making, "lane", None)
        if lane is None:
            lane = making.lane = _Lane(stream)
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


class _Lane:
    """One thread's pinned buffers, which it uses in turn."""

    def __init__(self, stream: int) -> None:
        nbytes = BUFFER_BYTES * BUFFERS_A_THREAD
        self._stream = stream
        self._mapping = mmap.mmap(-1, nbytes)
        self._view = (ctypes.c_char * nbytes).from_buffer(self._mapping)
        self._address = ctypes.addressof(self._view)
        prefer_huge_pages(self._address, nbytes)
        populate(self._address, nbytes)
        cuda_driver.register_host(self._address, nbytes)
        self._fetched: list[Any] = []
        self._turn = 0

    def carry(self, target: int, source: int, nbytes: int) -> None:
        """Copy into a buffer once the GPU has fetched what was in it, and enqueue that it is fetched."""
        turn = self._turn % BUFFERS_A_THREAD
        self._turn += 1
        if turn < len(self._fetched):
            cuda_driver.wait_for_event(self._fetched[turn])
        else:
            self._fetched.append(cuda_driver.create_event())
        buffer = self._address + turn * BUFFER_BYTES
        _libc.memcpy(buffer, source, nbytes)
        cuda_driver.copy_to_device(target, buffer, nbytes, self._stream)
        cuda_driver.record_event(self._fetched[turn], self._stream)

    def close(self) -> None:
        """Give the buffers back once the GPU has fetched what is in them."""
        for event in self._fetched:
            cuda_driver.wait_for_event(event)
            cuda_driver.destroy_event(event)
        cuda_driver.unregister_host(self._address)
        del self._view
        self._mapping.close()
