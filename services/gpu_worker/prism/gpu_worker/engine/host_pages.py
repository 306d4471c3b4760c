"""Pages of host memory: huge where the kernel allows that, and there before they are used."""

import ctypes
import errno
import os

from prism.common.errors import ErrorCode, PrismError

MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages from `address`; where there are none, that changes nothing."""
    _libc.madvise(address, nbytes, MADV_HUGEPAGE)


def populate(address: int, nbytes: int) -> None:
    """Have memory behind `nbytes` from `address`, whole pages. Raises PrismError(out_of_memory)."""
    if _libc.madvise(address, nbytes, MADV_POPULATE_WRITE) == 0:
        return
    error = ctypes.get_errno()
    # Kernels before 5.14 don't know it; pinning then populates, only slower.
    if error != errno.EINVAL:
        raise PrismError(
            ErrorCode.OUT_OF_MEMORY, f"no host memory for the image: {os.strerror(error)}", retry=True
        )
