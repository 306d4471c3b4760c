"""Planning and reading checkpoint images."""

import contextlib
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.model_store.model_folders import TENSORS, big_model, tensor_bytes, write_model, write_safetensors

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import create_memfd, read_memfd
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.content_hash import hash_of_image
from prism.model_store.staging import (
    REGION_ALIGNMENT,
    ImagePlan,
    ReadProgress,
    Segment,
    plan_checkpoint_image,
    read_image,
)

pytestmark = pytest.mark.core


def filled(plan: ImagePlan, progress: ReadProgress | None = None) -> tuple[bytes, str]:
    fd = create_memfd("test", plan.nbytes)
    try:
        content_hash = read_image(plan, fd, 3, progress or ReadProgress(plan.nbytes))
        return read_memfd(fd, plan.nbytes), content_hash
    finally:
        os.close(fd)


def test_every_tensor_is_where_the_plan_says(tmp_path: Path) -> None:
    plan = plan_checkpoint_image(read_checkpoint(write_model(tmp_path / "m")))
    content, content_hash = filled(plan)
    assert {tensor.name for tensor in plan.tensors} == set(TENSORS)
    for tensor in plan.tensors:
        expected = tensor_bytes(tensor.name, tensor.nbytes)
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == expected
    assert content_hash == hash_of_image(memoryview(content))


def test_each_file_begins_at_a_huge_page(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    write_safetensors(folder / "b.safetensors", {"second": ("F32", (10,))})
    plan = plan_checkpoint_image(read_checkpoint(folder))
    offsets = {tensor.name: tensor.offset for tensor in plan.tensors}
    assert offsets["second"] == REGION_ALIGNMENT
    content, _ = filled(plan)
    assert content[REGION_ALIGNMENT : REGION_ALIGNMENT + 40] == tensor_bytes("second", 40)


def test_a_tensor_that_the_file_leaves_unaligned_gets_an_aligned_place(tmp_path: Path) -> None:
    tensors = {"odd": ("I8", (3,)), "wide": ("I64", (5,)), "half": ("BF16", (2,))}
    plan = plan_checkpoint_image(read_checkpoint(write_model(tmp_path / "m", tensors=tensors)))
    offsets = {tensor.name: tensor.offset for tensor in plan.tensors}
    assert offsets["wide"] % 8 == 0
    assert offsets["half"] % 2 == 0
    content, content_hash = filled(plan)
    for tensor in plan.tensors:
        expected = tensor_bytes(tensor.name, tensor.nbytes)
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == expected
    assert content_hash == hash_of_image(memoryview(content))


def test_many_chunks_arrive_whole_and_progress_ends_at_the_total(tmp_path: Path) -> None:
    folder = big_model(tmp_path / "m", 30)
    plan = plan_checkpoint_image(read_checkpoint(folder))
    progress = ReadProgress(plan.nbytes)
    content, _ = filled(plan, progress)
    assert content == (folder / "model.safetensors").read_bytes()[-30_000_000:]
    assert progress.done_bytes == plan.nbytes == 30_000_000


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 200), st.integers(0, 30)), max_size=6),
    st.integers(0, 40),
)
def test_segments_may_begin_and_end_anywhere_in_blocks(
    parts: list[tuple[int, int, int]], left_over: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        file.write_bytes(bytes(range(1, 256)) * 2)
        expected, segments = b"", []
        for gap, nbytes, file_offset in parts:
            expected += bytes(gap)
            segments.append(Segment(file, file_offset, len(expected), nbytes))
            expected += file.read_bytes()[file_offset : file_offset + nbytes]
        expected += bytes(left_over)
        plan = ImagePlan(len(expected), tuple(segments), [])
        blocks = {
            "prism.model_store.staging.BLOCK_BYTES": 64,
            "prism.model_store.content_hash.BLOCK_BYTES": 64,
        }
        with contextlib.ExitStack() as stack:
            for name, nbytes in {**blocks, "prism.model_store.staging.READ_BYTES": 24}.items():
                stack.enter_context(mock.patch(name, nbytes))
            content, content_hash = filled(plan)
            assert content_hash == hash_of_image(memoryview(expected))
        assert content == expected


def test_a_cancelled_reading_stops(tmp_path: Path) -> None:
    plan = plan_checkpoint_image(read_checkpoint(big_model(tmp_path / "m", 20)))
    progress = ReadProgress(plan.nbytes)
    progress.cancelled.set()
    with pytest.raises(PrismError) as caught:
        filled(plan, progress)
    assert caught.value.code is ErrorCode.CANCELLED
    assert progress.done_bytes == 0


def test_a_file_that_shrinks_meanwhile_is_told_and_nothing_stays_open(tmp_path: Path) -> None:
    folder = big_model(tmp_path / "m", 20)
    plan = plan_checkpoint_image(read_checkpoint(folder))
    os.truncate(folder / "model.safetensors", 9_000_000)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PrismError, match=r"model\.safetensors ended early"):
        filled(plan)
    assert os.listdir("/proc/self/fd") == before
