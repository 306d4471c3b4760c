"""Reading a placement file: a JSON list of `ModelSpec`."""

from pathlib import Path

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelSpec


def read_placement_file(path: Path) -> list[ModelSpec]:
    """The models of a placement file, relative `model_path`s resolved against the file's folder when they
    exist there. Raises PrismError(invalid_request) that names the file, the field and what is allowed."""
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"placement file {path}: {error.strerror}") from error
    try:
        specs = msgspec.json.decode(payload, type=list[ModelSpec])
    except msgspec.DecodeError as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"placement file {path}: {error}") from error
    problems = [problem for spec in specs for problem in _problems(spec)]
    names = [spec.model_name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"model_name {name!r} appears twice" for name in twice]
    if problems:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"placement file {path}: " + "; ".join(problems))
    return [_resolved(spec, path.parent) for spec in specs]


def _problems(spec: ModelSpec) -> list[str]:
    found = []
    if not spec.model_name:
        found.append("a model_name is empty")
    if spec.tp_size < 1:
        found.append(f"{spec.model_name}: tp_size {spec.tp_size} is below 1")
    for placement in spec.init_placements:
        gpu_ids = placement.gpu_ids
        if len(gpu_ids) != spec.tp_size:
            found.append(
                f"{spec.model_name}: tp_size is {spec.tp_size}, gpu_ids {gpu_ids} are {len(gpu_ids)}"
            )
        if placement.max_memory_pool_size is not None and placement.max_memory_pool_size <= 0:
            found.append(f"{spec.model_name}: max_memory_pool_size must be above 0 GB")
    return found


def _resolved(spec: ModelSpec, folder: Path) -> ModelSpec:
    def resolve(path: str | None) -> str | None:
        if path is None or Path(path).is_absolute() or not (folder / path).is_dir():
            return path
        return str((folder / path).resolve())

    return msgspec.structs.replace(
        spec, model_path=resolve(spec.model_path) or "", tokenizer_path=resolve(spec.tokenizer_path)
    )
