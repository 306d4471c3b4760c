"""An image in host memory, pinned for copies at the speed of the bus."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import cuda_driver

CHUNK_BYTES = 512 * 1024 * 1024
THREADS = 4
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class RegisteredImage:
    """The first `nbytes` of a memfd, mapped until `close`, and registered with CUDA piece by piece.

    In pieces: while one is pinned, the driver lets nothing else of the process through, decoding included,
    and a copy must not span two registrations. Memory comes before it is pinned, by several threads, and in
    huge pages where the kernel allows that for shared memory, which makes pinning several times as fast. What
    is pinned stays so until `unpin`: usually that is once for an engine's life.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.inode = os.fstat(fd).st_ino
        self._mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._view = (ctypes.c_char * nbytes).from_buffer(self._mapping)
        self.address = ctypes.addressof(self._view)
        self._registered: set[int] = set()
        _libc.madvise(self.address, nbytes, MADV_HUGEPAGE)

    @classmethod
    def of(cls, fd: int, nbytes: int, known: "RegisteredImage | None") -> "RegisteredImage":
        """The image behind `fd`: `known` itself if it is of the same memory."""
        if known is not None and known.inode == os.fstat(fd).st_ino and known.nbytes == nbytes:
            return known
        return cls(fd, nbytes)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Offset and size of each registration."""
        for offset in range(0, self.nbytes, CHUNK_BYTES):
            yield offset, min(CHUNK_BYTES, self.nbytes - offset)

    @property
    def pinned_bytes(self) -> int:
        """How much is pinned now."""
        return sum(size for offset, size in self.pieces() if offset in self._registered)

    def pin(self) -> None:
        """Have all of it pinned. Raises as `pinned_pieces` does."""
        for _ in self.pinned_pieces():
            pass

    def pinned_pieces(self, threads: int = 1) -> Iterator[tuple[int, int]]:
        """Offset and size of each piece, in order, each once it is pinned; later ones are pinned meanwhile,
        by `threads` threads.

        Raises PrismError(out_of_memory) when the host has too little; what is pinned by then stays so.
        """
        if len(self._registered) == len(list(self.pieces())):
            yield from self.pieces()
            return
        context = cuda_driver.current_context()
        populating = ThreadPoolExecutor(THREADS, "populate")
        pinning = ThreadPoolExecutor(threads, "pin", cuda_driver.use_context, (context,))
        try:
            populated = [populating.submit(self._populate, *piece) for piece in self.pieces()]
            pinned = [
                pinning.submit(self._register, *piece, ready)
                for piece, ready in zip(self.pieces(), populated, strict=True)
            ]
            for piece, done in zip(self.pieces(), pinned, strict=True):
                done.result()
                yield piece
        finally:
            populating.shutdown(cancel_futures=True)
            pinning.shutdown(cancel_futures=True)

    def _register(self, offset: int, size: int, populated: "Future[None]") -> None:
        if offset not in self._registered:
            populated.result()
            cuda_driver.register_host(self.address + offset, size)
            self._registered.add(offset)

    def unpin(self) -> None:
        """Let go of the pins; the mapping stays. No copy may be under way."""
        for offset in sorted(self._registered):
            cuda_driver.unregister_host(self.address + offset)
            self._registered.remove(offset)

    def close(self) -> None:
        """Unpin and unmap. No copy may be under way."""
        self.unpin()
        del self._view
        self._mapping.close()

    def _populate(self, offset: int, size: int) -> None:
        if _libc.madvise(self.address + offset, size, MADV_POPULATE_WRITE) == 0:
            return
        error = ctypes.get_errno()
        # Kernels before 5.14 don't know it; pinning then populates, only slower.
        if error != errno.EINVAL:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY, f"no host memory for the image: {os.strerror(error)}", retry=True
            )
