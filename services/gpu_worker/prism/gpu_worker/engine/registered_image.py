"""An image in host memory, pinned for copies at the speed of the bus."""

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from prism.common.errors import PrismError
from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.host_pages import populate, prefer_huge_pages

log = logging.getLogger(__name__)

CHUNK_BYTES = 128 * 1024 * 1024
THREADS = 4
# The worker asks the driver meanwhile what a dozing engine still holds.
PIN_AFTER_S = 0.05


class RegisteredImage:
    """The first `nbytes` of a memfd, mapped until `close`, and registered with CUDA piece by piece.

    In pieces: while one is pinned, the driver lets nothing else of the process through, decoding included,
    and a copy must not span two registrations. Memory comes before it is pinned, by several threads, and in
    huge pages where the kernel allows that for shared memory, which makes pinning several times as fast. What
    is pinned stays so until `unpin`: usually that is once for an engine's life.

    One thread copies, pins and unpins; `pin_behind` pins beside it.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.inode = os.fstat(fd).st_ino
        self._mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._view = (ctypes.c_char * nbytes).from_buffer(self._mapping)
        self.address = ctypes.addressof(self._view)
        self._registered: set[int] = set()
        self._registering = {offset: threading.Lock() for offset, _ in self.pieces()}
        self._behind: threading.Thread | None = None
        self._stop_behind = threading.Event()
        prefer_huge_pages(self.address, nbytes)

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

    def is_pinned(self, offset: int) -> bool:
        """Whether the piece at `offset` is pinned now."""
        return offset in self._registered

    def pinned_pieces(self, threads: int = 1) -> Iterator[tuple[int, int]]:
        """Offset and size of each piece, in order, each once it is pinned; later ones are pinned meanwhile,
        by `threads` threads.

        Raises PrismError(out_of_memory) when the host has too little; what is pinned by then stays so.
        """
        if self.pinned_bytes == self.nbytes:
            yield from self.pieces()
            return
        context = cuda_driver.current_context()
        populating = ThreadPoolExecutor(THREADS, "populate")
        pinning = ThreadPoolExecutor(threads, "pin", cuda_driver.use_context, (context,))
        try:
            populated = [
                populating.submit(populate, self.address + offset, size) for offset, size in self.pieces()
            ]
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

    def _register(self, offset: int, size: int, populated: "Future[None] | None" = None) -> None:
        if populated is not None:
            populated.result()
        with self._registering[offset]:
            if offset not in self._registered:
                cuda_driver.register_host(self.address + offset, size)
                self._registered.add(offset)

    def pin_behind(self) -> None:
        """Have the rest pinned by a thread, from PIN_AFTER_S on. Not for an engine that decodes or gives
        memory back: while a piece is pinned, the driver lets nothing else of this process through."""
        under_way = self._behind is not None and self._behind.is_alive()
        if under_way or self.pinned_bytes == self.nbytes:
            return
        context = cuda_driver.current_context()
        self._stop_behind.clear()

        def pin() -> None:
            cuda_driver.use_context(context)
            self._stop_behind.wait(PIN_AFTER_S)
            began = time.perf_counter()
            try:
                for offset, size in self.pieces():
                    if self._stop_behind.is_set():
                        return
                    populate(self.address + offset, size)
                    self._register(offset, size)
            except PrismError as error:
                # The next wake is slower then, no more.
                log.info("image left unpinned: %s", error)
                return
            log.info("image pinned: %.1f GB in %.2f s", self.nbytes / 1e9, time.perf_counter() - began)

        self._behind = threading.Thread(target=pin, name="pin behind", daemon=True)
        self._behind.start()

    def end_pinning_behind(self) -> None:
        """Wait until nothing is pinned from behind any more: a piece's time at most."""
        thread, self._behind = self._behind, None
        if thread is not None:
            self._stop_behind.set()
            thread.join()

    def unpin(self) -> None:
        """Let go of the pins; the mapping stays. No copy may be under way."""
        self.end_pinning_behind()
        context = cuda_driver.current_context()
        offsets = sorted(self._registered)
        with ThreadPoolExecutor(THREADS, "unpin", cuda_driver.use_context, (context,)) as unpinning:
            for offset in unpinning.map(self._unregister, offsets):
                self._registered.remove(offset)

    def _unregister(self, offset: int) -> int:
        cuda_driver.unregister_host(self.address + offset)
        return offset

    def close(self) -> None:
        """Unpin and unmap. No copy may be under way."""
        self.unpin()
        del self._view
        self._mapping.close()
