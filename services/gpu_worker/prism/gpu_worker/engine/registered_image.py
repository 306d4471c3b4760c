"""An image in host memory, pinned for copies at the speed of the bus."""

import ctypes
import mmap
import os

from prism.gpu_worker.engine import cuda_driver


class RegisteredImage:
    """The first `nbytes` of a memfd, mapped and registered with CUDA in one piece until `close`.

    In one piece, because an asynchronous copy must not span two registrations. Pinning costs about 45 ms a GB
    without huge pages, so it is done once for an engine's life.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.inode = os.fstat(fd).st_ino
        self._mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._view = (ctypes.c_char * nbytes).from_buffer(self._mapping)
        self.address = ctypes.addressof(self._view)
        try:
            cuda_driver.register_host(self.address, nbytes)
        except BaseException:
            self._unmap()
            raise

    @classmethod
    def of(cls, fd: int, nbytes: int, known: "RegisteredImage | None") -> "RegisteredImage":
        """The image behind `fd`: `known` itself if it is of the same memory."""
        if known is not None and known.inode == os.fstat(fd).st_ino and known.nbytes == nbytes:
            return known
        return cls(fd, nbytes)

    def close(self) -> None:
        """Unpin and unmap. No copy may be under way."""
        cuda_driver.unregister_host(self.address)
        self._unmap()

    def _unmap(self) -> None:
        del self._view
        self._mapping.close()
