"""Filling an image: what is read from where, and the parallel reading of it.

Threads read blocks straight into the image's mapping (`preadv` lets go of the GIL), each by pieces that it
hashes while they are in its core's cache.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import mapped
from prism.common.messages.store import TensorEntry
from prism.model_store.checkpoint import Checkpoint
from prism.model_store.content_hash import BLOCK_BYTES, hash_of_blocks
from prism.model_store.file_errors import reading

READ_BYTES = 1024 * 1024
REGION_ALIGNMENT = 2 * 1024 * 1024


@dataclass(frozen=True)
class Segment:
    """`nbytes` bytes of a file from `file_offset` on, which go to `image_offset`."""

    path: Path
    file_offset: int
    image_offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where it ends in the image."""
        return self.image_offset + self.nbytes


@dataclass(frozen=True)
class ImagePlan:
    """How to make an image of `nbytes` bytes. Segments go by offset; bytes between them stay zero."""

    nbytes: int
    segments: tuple[Segment, ...]
    tensors: list[TensorEntry]


class ReadProgress:
    """How far a reading is, for others to look at, and a way to stop it."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.cancelled = threading.Event()


def plan_checkpoint_image(checkpoint: Checkpoint) -> ImagePlan:
    """Each file's data region as it is, aligned to REGION_ALIGNMENT; a tensor that this would leave
    unaligned to its element size is read once more, to a place of its own at the end."""
    segments: list[Segment] = []
    tensors: list[TensorEntry] = []
    unaligned: list[tuple[Segment, TensorEntry]] = []
    end = 0
    for file in checkpoint.files:
        start = _aligned(end, REGION_ALIGNMENT)
        if file.data_bytes:
            segments.append(Segment(file.path, file.data_offset, start, file.data_bytes))
        end = start + file.data_bytes
        for tensor in file.tensors:
            entry = TensorEntry(tensor.name, start + tensor.offset, tensor.nbytes, tensor.dtype, tensor.shape)
            if entry.offset % tensor.itemsize:
                source = Segment(file.path, file.data_offset + tensor.offset, 0, tensor.nbytes)
                unaligned.append((source, entry))
            else:
                tensors.append(entry)
    for source, entry in unaligned:
        # A cache line is a multiple of every element size.
        start = _aligned(end, 64)
        segments.append(Segment(source.path, source.file_offset, start, source.nbytes))
        tensors.append(TensorEntry(entry.name, start, entry.nbytes, entry.dtype, entry.shape))
        end = start + source.nbytes
    return ImagePlan(end, tuple(segments), tensors)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def read_image(plan: ImagePlan, fd: int, threads: int, progress: ReadProgress) -> str:
    """Fill the memfd `fd` as `plan` says and return the content hash of the whole image. Blocks.

    Raises PrismError: model_failed when a file can't be read or ends early, cancelled once
    `progress.cancelled` is set. Threads, mappings and files are gone when it returns or raises.
    """
    digests = []
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(mapped(fd, plan.nbytes, write=True))
        files = {segment.path: _opened(segment.path, stack) for segment in plan.segments}
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="read"))
        futures = [pool.submit(_read_block, files, block, view, progress) for block in _blocks(plan)]
        try:
            for future in futures:
                digests.append(future.result())
                progress.done_bytes = min(len(digests) * BLOCK_BYTES, plan.nbytes)
        except BaseException:
            progress.cancelled.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return hash_of_blocks(digests)


@dataclass(frozen=True)
class _Block:
    """A block of the image, and what of it is read from files, by offset."""

    begin: int
    end: int
    parts: list[Segment]


def _blocks(plan: ImagePlan) -> Iterator[_Block]:
    first = 0
    for begin in range(0, plan.nbytes, BLOCK_BYTES):
        end = min(begin + BLOCK_BYTES, plan.nbytes)
        while first < len(plan.segments) and plan.segments[first].end <= begin:
            first += 1
        parts = []
        for segment in itertools.islice(plan.segments, first, None):
            if segment.image_offset >= end:
                break
            parts.append(_within(segment, begin, end))
        yield _Block(begin, end, parts)


def _within(segment: Segment, begin: int, end: int) -> Segment:
    skipped = max(begin - segment.image_offset, 0)
    offset = segment.image_offset + skipped
    nbytes = min(segment.end, end) - offset
    return Segment(segment.path, segment.file_offset + skipped, offset, nbytes)


def _opened(path: Path, stack: contextlib.ExitStack) -> int:
    with reading(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _read_block(files: dict[Path, int], block: _Block, view: memoryview, progress: ReadProgress) -> bytes:
    """Fill a block of `view`; returns its digest."""
    digest = xxhash.xxh3_128()
    hashed = block.begin
    for part in block.parts:
        for offset in range(part.image_offset, part.end, READ_BYTES):
            end = min(offset + READ_BYTES, part.end)
            file_offset = part.file_offset + offset - part.image_offset
            with view[offset:end] as target:
                _read_exactly(part.path, files[part.path], file_offset, target, progress)
            with view[hashed:end] as content:
                digest.update(content)
            hashed = end
    with view[hashed : block.end] as rest:
        digest.update(rest)
    return digest.digest()


def _read_exactly(path: Path, fd: int, offset: int, target: memoryview, progress: ReadProgress) -> None:
    done = 0
    while done < len(target):
        if progress.cancelled.is_set():
            raise PrismError(ErrorCode.CANCELLED, "staging was cancelled", retry=True)
        try:
            with target[done:] as rest:
                count = os.preadv(fd, [rest], offset + done)
        except OSError as error:
            raise PrismError(ErrorCode.MODEL_FAILED, f"reading {path} failed: {error.strerror}") from error
        if count == 0:
            raise PrismError(ErrorCode.MODEL_FAILED, f"{path} ended early: it was cut while it was read")
        done += count
