"""Arenas give memory back and take it again under the same addresses."""

import os

import pytest
import torch

from prism.gpu_worker.engine.arena import COPY_CHUNK_BYTES, PAGE, MemoryArena

pytestmark = pytest.mark.core

MB = 1 << 20


def test_memory_stands_behind_an_arena_only_once_touched() -> None:
    arena = MemoryArena("test", 8 * MB)
    assert arena.resident_bytes == 0
    arena.tensor((MB,), torch.uint8).fill_(1)
    assert arena.resident_bytes == MB


def test_unmapping_gives_all_memory_back_and_mapping_restores_the_addresses() -> None:
    arena = MemoryArena("test", 8 * MB)
    tensor = arena.tensor((2 * MB,), torch.uint8)
    tensor.fill_(7)
    address = tensor.data_ptr()
    arena.unmap()
    assert arena.resident_bytes == 0
    arena.map()
    assert tensor.data_ptr() == address
    assert int(tensor.sum()) == 0
    tensor.fill_(3)
    assert int(tensor[-1]) == 3


def test_tensors_do_not_overlap_and_are_aligned() -> None:
    arena = MemoryArena("test", MB)
    first = arena.tensor((3, 5), torch.float32)
    second = arena.tensor((7,), torch.int64)
    first.fill_(1.5)
    second.fill_(-1)
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    assert torch.all(first == 1.5)
    assert torch.all(second == -1)


def test_an_arena_that_is_full_says_so() -> None:
    arena = MemoryArena("test", MB)
    with pytest.raises(MemoryError, match="don't fit"):
        arena.tensor((MB + 1,), torch.uint8)


@pytest.mark.parametrize("threads", [1, 3])
def test_content_is_copied_in_and_out_unchanged(threads: int) -> None:
    nbytes = 2 * COPY_CHUNK_BYTES + 12345
    content = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    source = os.memfd_create("source")
    os.write(source, content.numpy().tobytes())
    arena = MemoryArena("test", nbytes)
    arena.copy_in(source, nbytes, threads=threads)
    assert torch.equal(arena.view(0, (nbytes,), torch.uint8), content)
    target = os.memfd_create("target")
    arena.copy_out(target, nbytes)
    assert os.pread(target, nbytes, 0) == content.numpy().tobytes()
    os.close(source)
    os.close(target)


def test_an_image_that_is_too_short_is_an_error() -> None:
    source = os.memfd_create("source")
    os.write(source, b"x" * 100)
    arena = MemoryArena("test", MB)
    with pytest.raises(OSError, match="image ends at 100 of 200 bytes"):
        arena.copy_in(source, 200, threads=1)
    os.close(source)


def test_what_nothing_was_written_to_is_known_page_by_page() -> None:
    arena = MemoryArena("test", 8 * PAGE)
    assert arena.untouched_bytes(0, 8 * PAGE) == 8 * PAGE
    arena.view(2 * PAGE, (PAGE,), torch.uint8).zero_()
    assert arena.untouched_bytes(0, 8 * PAGE) == 7 * PAGE
    assert arena.untouched_bytes(2 * PAGE, PAGE) == 0
    assert arena.untouched_bytes(PAGE - 1, PAGE + 2) == PAGE
    assert arena.untouched_bytes(2 * PAGE + 1, PAGE) == 0, "no whole page"
    arena.unmap()
    arena.map()
    assert arena.untouched_bytes(0, 8 * PAGE) == 8 * PAGE
