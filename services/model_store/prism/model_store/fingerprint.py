"""Telling whether a model folder still holds the same model, without reading all of its weights."""

import os
from pathlib import Path

import xxhash

from prism.model_store.checkpoint import Checkpoint, weight_paths
from prism.model_store.file_errors import reading
from prism.model_store.safetensors_header import WeightFile

SAMPLES = 64
SAMPLE_BYTES = 4096

Signature = tuple[tuple[str, int, int], ...]


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """xxh3_128, as 32 hex digits, of config.json, of each weight file's name, size, modification time and
    header, and of SAMPLES blocks spread over its data."""
    digest = xxhash.xxh3_128(checkpoint.config_bytes)
    for file in checkpoint.files:
        digest.update(f"\0{file.path.name}\0{file.size}\0{file.mtime_ns}\0".encode())
        digest.update(file.header)
        for block in _sampled_blocks(file):
            digest.update(block)
    return digest.hexdigest()


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
