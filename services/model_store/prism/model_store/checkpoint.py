"""A model folder in the style of Hugging Face: which files make it up, and what their headers say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism.common.errors import ErrorCode, PrismError
from prism.model_store.file_errors import reading
from prism.model_store.safetensors_header import WeightFile, read_weight_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, headers read, weights not. `config_bytes` is config.json as it stands."""

    folder: Path
    config_bytes: bytes
    config: dict[str, Any]
    generation_config: dict[str, Any]
    files: tuple[WeightFile, ...]

    @property
    def nbytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.size for file in self.files)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what `folder` says of itself.

    Raises PrismError(model_failed) when the folder, its config.json or a weight file is missing or broken.
    """
    with reading(folder):
        if not folder.is_dir():
            raise PrismError(
                ErrorCode.MODEL_FAILED,
                f"model folder {folder} does not exist on this node; download the model there or "
                "correct model_path in the placement file",
            )
        config_bytes, config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        return Checkpoint(
            folder=folder,
            config_bytes=config_bytes,
            config=config,
            generation_config=read_json(generation)[1] if generation.exists() else {},
            files=tuple(read_weight_file(path) for path in weight_paths(folder)),
        )


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a model, by name: those of its index, else the single file, else all. Raises
    PrismError(model_failed), and OSError when the folder can't be looked into."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX)[1].get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise PrismError(ErrorCode.MODEL_FAILED, f"{folder / INDEX} has no weight_map; fetch it again")
        return [folder / name for name in sorted({str(name) for name in weight_map.values()})]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    # Not by a pattern: nothing would be found in a folder that may not be read.
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(".safetensors"))
    if not paths:
        raise PrismError(
            ErrorCode.MODEL_FAILED,
            f"model folder {folder} holds no .safetensors file; other formats are not read, "
            "convert the model with transformers' save_pretrained",
        )
    return paths


def read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The JSON object in the file at `path`, as bytes and decoded. Raises PrismError(model_failed)."""
    try:
        with reading(path, "is the model folder whole?"):
            payload = path.read_bytes()
        value = json.loads(payload)
    except ValueError as error:
        raise PrismError(ErrorCode.MODEL_FAILED, f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise PrismError(ErrorCode.MODEL_FAILED, f"{path} is not a JSON object; fetch it again")
    return payload, value
