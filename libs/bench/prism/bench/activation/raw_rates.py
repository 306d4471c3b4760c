"""What this host's disk and memory give without anything of ours: the ceilings of staging."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from prism.common.memfd import create_memfd, mapped

CHUNK_BYTES = 8 * 1024 * 1024
SOURCE_BYTES = 256 * 1024 * 1024

Chunk = TypeVar("Chunk")

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.restype = ctypes.c_void_p


def drop_cached(files: Sequence[Path]) -> None:
    """Have the kernel forget what it holds of these files; what is not on disk yet is written first."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_rate(files: Sequence[Path], threads: int) -> float:
    """Bytes per second of reading `files` whole by `threads` threads, each into a buffer of its own that it
    uses again and again. From disk, if they are not in the page cache."""
    chunks = [(file, offset) for file in files for offset in range(0, file.stat().st_size, CHUNK_BYTES)]
    descriptors = {file: os.open(file, os.O_RDONLY) for file in files}

    def read(part: Sequence[tuple[Path, int]]) -> int:
        with mmap.mmap(-1, CHUNK_BYTES) as buffer:
            return sum(os.preadv(descriptors[file], [buffer], offset) for file, offset in part)

    try:
        return _rate(read, chunks, threads)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def copy_rate(nbytes: int, threads: int) -> float:
    """Bytes per second of copying into fresh shared memory by `threads` threads: what has to be done at least
    with bytes that are in the page cache. The kernel gives the memory, in huge pages where it may."""
    descriptor = create_memfd("prism-bench-copy", nbytes)
    try:
        with mmap.mmap(-1, SOURCE_BYTES) as source, mapped(descriptor, nbytes, write=True) as target:
            source.write(b"\x5a" * SOURCE_BYTES)
            source_address = ctypes.addressof(ctypes.c_char.from_buffer(source))
            target_address = ctypes.addressof(ctypes.c_char.from_buffer(target))

            def copy(part: Sequence[int]) -> int:
                done = 0
                for offset in part:
                    size = min(CHUNK_BYTES, nbytes - offset)
                    # ctypes lets go of the interpreter's lock meanwhile.
                    _libc.memcpy(target_address + offset, source_address + offset % SOURCE_BYTES, size)
                    done += size
                return done

            return _rate(copy, range(0, nbytes, CHUNK_BYTES), threads)
    finally:
        os.close(descriptor)


def _rate(work: Callable[[Sequence[Chunk]], int], chunks: Sequence[Chunk], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        done = sum(pool.map(work, [chunks[index::threads] for index in range(threads)]))
        return done / (time.perf_counter() - began)
