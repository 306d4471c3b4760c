"""Headers of safetensors files, whole and broken."""

import json
import struct
from pathlib import Path

import pytest
from tests.model_store.model_folders import TENSORS, write_safetensors

from prism.common.errors import ErrorCode, PrismError
from prism.model_store.safetensors_header import StoredTensor, parse_header, read_weight_file

pytestmark = pytest.mark.core


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    return path


def test_tensors_are_where_the_file_has_them(weights: Path) -> None:
    file = read_weight_file(weights)
    assert [tensor.name for tensor in file.tensors] == list(TENSORS)
    assert file.tensors[1] == StoredTensor(
        "model.layers.0.mlp.up_proj.weight", "float32", (256, 64), 100 * 64 * 4, 256 * 64 * 4
    )
    assert file.data_bytes == sum(tensor.nbytes for tensor in file.tensors)


def test_safetensors_itself_agrees(weights: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(weights, framework="numpy") as theirs:
        shapes = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118
    assert {tensor.name: tensor.shape for tensor in read_weight_file(weights).tensors} == shapes


def refusal(path: Path) -> str:
    with pytest.raises(PrismError) as caught:
        read_weight_file(path)
    assert caught.value.code is ErrorCode.MODEL_FAILED
    assert str(path) in caught.value.message
    return caught.value.message


def test_a_file_cut_off_in_its_data_is_told_with_both_sizes(weights: Path) -> None:
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    data = sum(tensor.nbytes for tensor in parse_header(_header(whole), 10**9, weights))
    assert f"promises {data} bytes of tensors, the file holds {data - 1000}" in refusal(weights)


def _header(whole: bytes) -> bytes:
    return whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "do not begin with a safetensors header"),
        (b"\x05\0\0", "do not begin with a safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "do not begin with a safetensors header"),
        (struct.pack("<Q", 8) + b"{broken}", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "entry of tensor 'a' is malformed"),
    ],
)
def test_a_broken_header_is_told(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    assert what in refusal(path)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "does not fit its bytes 0 to 8"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "does not fit its bytes"),
        ({"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}, "unknown type 'Q7'"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "cut off"),
    ],
)
def test_a_tensor_that_can_not_be_is_told(entry: object, what: str) -> None:
    with pytest.raises(PrismError, match=what):
        parse_header(json.dumps({"a": entry}).encode(), 8, Path("a.safetensors"))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.safetensors")
