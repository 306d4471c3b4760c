"""Memory that can be given back while its addresses stay: a memfd mapped at a fixed place.

The CPU's counterpart of CUDA virtual memory: an unmapped arena keeps its address range, so tensors over it
stay valid objects, and mapping it again puts fresh pages under the same addresses. Touching an unmapped
arena is a segmentation fault, never a silent read of zeros. How much memory stands behind an arena is
what the kernel says of its memfd, to this process and to any other that may look.
"""

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from prism.gpu_worker.engine.arrivals import Arrivals

PAGE = mmap.PAGESIZE
TENSOR_ALIGNMENT = 64
COPY_CHUNK_BYTES = 16 * 1024 * 1024
PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def align(offset: int, alignment: int) -> int:
    """`offset` rounded up to a multiple of `alignment`."""
    return -(-offset // alignment) * alignment


class MemoryArena:
    """`capacity` bytes of address space with shared memory behind it while `mapped`."""

    def __init__(self, name: str, capacity: int) -> None:
        self.capacity = align(max(capacity, PAGE), PAGE)
        self.used = 0
        self.mapped = False
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.capacity)
        self.address = self._mmap(0, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, self.fd)
        self.mapped = True
        self._buffer = (ctypes.c_char * self.capacity).from_address(self.address)

    def _mmap(self, address: int, protection: int, flags: int, fd: int) -> int:
        if address:
            flags |= MAP_FIXED
        result: int | None = _libc.mmap(address or None, self.capacity, protection, flags, fd, 0)
        if result is None or result == MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, f"mmap of {self.capacity} bytes: {os.strerror(error)}")
        return result

    @property
    def resident_bytes(self) -> int:
        """Bytes of memory behind the arena now."""
        return os.fstat(self.fd).st_blocks * 512

    def untouched_bytes(self, offset: int, nbytes: int) -> int:
        """Bytes of whole pages in this part of a mapped arena that nothing has been written to yet."""
        begin, end = align(offset, PAGE), (offset + nbytes) // PAGE * PAGE
        untouched = 0
        while begin < end:
            hole = min(os.lseek(self.fd, begin, os.SEEK_HOLE), end)
            try:
                begin = min(os.lseek(self.fd, hole, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                begin = end  # No data behind it.
            untouched += begin - hole
        return untouched

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the next free bytes, not initialised beyond what fresh pages are: zero."""
        offset = align(self.used, TENSOR_ALIGNMENT)
        count = 1
        for size in shape:
            count *= size
        nbytes = count * dtype.itemsize
        if offset + nbytes > self.capacity:
            raise MemoryError(f"arena of {self.capacity} bytes holds {self.used}, {nbytes} more don't fit")
        self.used = offset + nbytes
        return self.view(offset, shape, dtype)

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the bytes at `offset`."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)

    def unmap(self) -> None:
        """Give all memory back; the address range stays reserved."""
        if not self.mapped:
            return
        self._mmap(
            self.address,
            PROT_NONE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE,
            -1,
        )
        self.mapped = False
        self._punch(0, self.capacity)

    def give_back(self, begin: int, end: int) -> None:
        """Give back the whole pages between these offsets; they read as zero from now on."""
        begin, end = align(begin, PAGE), end // PAGE * PAGE
        if begin < end:
            self._punch(begin, end - begin)

    def _punch(self, offset: int, nbytes: int) -> None:
        if _libc.fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, nbytes) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"fallocate: {os.strerror(error)}")

    def map(self) -> None:
        """Put fresh, zeroed pages behind the addresses again (as they are touched)."""
        if self.mapped:
            return
        self._mmap(self.address, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, self.fd)
        self.mapped = True

    def copy_in(self, source_fd: int, nbytes: int, *, threads: int) -> None:
        """Fill the first `nbytes` from the start of `source_fd`, by several threads."""
        self.begin_copy_in(source_fd, nbytes, threads=threads).finish()

    def begin_copy_in(self, source_fd: int, nbytes: int, *, threads: int) -> Arrivals:
        """Have the first `nbytes` filled from the start of `source_fd`, which stays open meanwhile, by
        several threads. The copies that fail raise OSError."""
        began = time.perf_counter()
        target: Any = memoryview(self._buffer).cast("B")

        def copy(offset: int) -> None:
            end = min(offset + COPY_CHUNK_BYTES, nbytes)
            while offset < end:
                got = os.preadv(source_fd, [target[offset:end]], offset)
                if got == 0:
                    raise OSError(f"image ends at {offset} of {nbytes} bytes")
                offset += got

        pool = ThreadPoolExecutor(max(1, threads), "copy in")
        offsets = range(0, nbytes, COPY_CHUNK_BYTES)
        copies = [pool.submit(copy, offset) for offset in offsets]
        pieces = [
            (min(offset + COPY_CHUNK_BYTES, nbytes), _CopiedPieces(copies[: index + 1]))
            for index, offset in enumerate(offsets)
        ]
        return Arrivals(pieces, began, lambda: pool.shutdown(cancel_futures=True))

    def copy_out(self, target_fd: int, nbytes: int) -> None:
        """Write the first `nbytes` to the start of `target_fd`."""
        source: Any = memoryview(self._buffer).cast("B")
        offset = 0
        while offset < nbytes:
            offset += os.pwrite(target_fd, source[offset : min(offset + COPY_CHUNK_BYTES, nbytes)], offset)


@dataclass(frozen=True)
class _CopiedPieces:
    """See arrivals.Piece: the last of `copies`, which come in any order."""

    copies: "Sequence[Future[None]]"

    def hold_back(self) -> None:
        for copy in self.copies:
            copy.result()

    def wait(self) -> None:
        self.copies[-1].result()
