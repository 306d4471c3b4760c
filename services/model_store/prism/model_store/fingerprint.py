"""Telling whether a model folder still holds the same model, without reading all of its weights."""

import os
from pathlib import Path
from typing import NamedTuple

import xxhash

from prism.model_store.checkpoint import Checkpoint, weight_paths
from prism.model_store.file_errors import reading
from prism.model_store.safetensors_header import WeightFile

SAMPLES = 64
SAMPLE_BYTES = 4096

Signature = tuple[tuple[str, int, int], ...]


class Identity(NamedTuple):
    """What a model's files are. `version` goes by their content, so that copies on several nodes have the
    same one; `fingerprint` goes by their modification times as well, so that it changes with any write."""

    fingerprint: str
    version: str


def identity_of(checkpoint: Checkpoint) -> Identity:
    """xxh3_128, as 32 hex digits, of config.json, of each weight file's name, size and header, and of SAMPLES
    blocks spread over its data; of its modification time too for the fingerprint."""
    fingerprint = xxhash.xxh3_128(checkpoint.config_bytes)
    version = xxhash.xxh3_128(checkpoint.config_bytes)
    for file in checkpoint.files:
        fingerprint.update(f"\0{file.path.name}\0{file.size}\0{file.mtime_ns}\0".encode())
        version.update(f"\0{file.path.name}\0{file.size}\0".encode())
        for block in (file.header, *_sampled_blocks(file)):
            fingerprint.update(block)
            version.update(block)
    return Identity(fingerprint.hexdigest(), version.hexdigest())


def _sampled_blocks(file: WeightFile) -> list[bytes]:
    last = max(0, file.data_bytes - SAMPLE_BYTES)
    offsets = sorted({last * index // (SAMPLES - 1) for index in range(SAMPLES)})
    with reading(file.path), file.path.open("rb") as opened:
        return [os.pread(opened.fileno(), SAMPLE_BYTES, file.data_offset + offset) for offset in offsets]


def signature_of(folder: Path) -> Signature:
    """Name, size and modification time of the files that the fingerprint depends on: cheap to compare."""
    with reading(folder, "is the model folder whole?"):
        paths = [folder / "config.json", *weight_paths(folder)]
        return tuple(
            (path.name, status.st_size, status.st_mtime_ns)
            for path, status in ((path, path.stat()) for path in paths)
        )
