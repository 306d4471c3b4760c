"""The header of a safetensors file: which tensors it holds, and where."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism.common.errors import ErrorCode, PrismError
from prism.model_store.file_errors import reading

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8

# safetensors' names of element types: torch's name, and the size of an element in bits.
DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. `offset` counts from the start of the file's data region, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.nbytes // self.elements if self.elements else 1


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file as its header and the file system describe it; sizes and offsets in bytes."""

    path: Path
    size: int
    mtime_ns: int
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def data_offset(self) -> int:
        """Where the data region begins in the file."""
        return _LENGTH_BYTES + len(self.header)

    @property
    def data_bytes(self) -> int:
        """How long the data region is."""
        return self.size - self.data_offset


def read_weight_file(path: Path) -> WeightFile:
    """Read the header of the file at `path`.

    Raises PrismError(model_failed) that says what is wrong with the file, and where.
    """
    with reading(path), path.open("rb") as file:
        status = os.fstat(file.fileno())
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if status.st_size < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, status.st_size):
            raise _broken(path, f"its {status.st_size} bytes do not begin with a safetensors header")
        header = file.read(length)
    if len(header) < length:
        raise _broken(path, "it ends within its header")
    tensors = parse_header(header, status.st_size - _LENGTH_BYTES - length, path)
    return WeightFile(path, status.st_size, status.st_mtime_ns, header, tensors)


def parse_header(header: bytes, data_bytes: int, path: Path) -> tuple[StoredTensor, ...]:
    """The tensors that `header` names, by offset, checked against a data region of `data_bytes` bytes.

    `path` is for the message alone. Raises PrismError(model_failed).
    """
    try:
        entries: Any = json.loads(header)
    except ValueError as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _broken(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = sorted(
        (_parse_entry(name, entry, path) for name, entry in entries.items()), key=lambda tensor: tensor.offset
    )
    needed = max((tensor.offset + tensor.nbytes for tensor in tensors), default=0)
    if needed > data_bytes:
        raise _broken(
            path, f"its header promises {needed} bytes of tensors, the file holds {data_bytes}: it is cut off"
        )
    return tuple(tensors)


def _parse_entry(name: str, entry: Any, path: Path) -> StoredTensor:
    try:
        code, shape = entry["dtype"], tuple(int(length) for length in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"the header's entry of tensor {name!r} is malformed") from error
    if code not in DTYPES:
        raise _broken(path, f"tensor {name!r} is of the unknown type {code!r}")
    dtype, bits = DTYPES[code]
    if begin < 0 or any(length < 0 for length in shape) or (end - begin) * 8 != math.prod(shape) * bits:
        raise _broken(
            path, f"tensor {name!r} of {dtype} {list(shape)} does not fit its bytes {begin} to {end}"
        )
    return StoredTensor(name, dtype, shape, begin, end - begin)


def _broken(path: Path, what: str) -> PrismError:
    return PrismError(
        ErrorCode.MODEL_FAILED, f"{path} is not a whole safetensors file: {what}; fetch it again"
    )
