"""Reading a placement file: a JSON list of `ModelSpec`, refused with all that is wrong with it at once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelSpec
from prism.common.placement_schema import Problem, schema_problems, shown


def read_placement_file(path: Path) -> list[ModelSpec]:
    """The models of a placement file, relative `model_path`s resolved against the file's folder when they
    exist there.

    Raises PrismError(invalid_request) with every problem, a line each: the field, its value, what is allowed.
    """
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"placement file {path}: {error.strerror}") from error
    try:
        document = json.loads(payload, parse_constant=_refuse_constant)
        json.dumps(document, ensure_ascii=False).encode()  # Refuses halves of surrogate pairs.
    except (ValueError, RecursionError) as error:
        raise PrismError(
            ErrorCode.INVALID_REQUEST, f"placement file {path} is not valid JSON: {error}"
        ) from error
    problems = sorted({*schema_problems(document), *consistency_problems(document)}, key=_in_file_order)
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"placement file {path} has {count} (see docs/placement-file.md):{lines}",
        )
    return [_resolved(spec, path.parent) for spec in msgspec.convert(document, list[ModelSpec])]


def consistency_problems(document: object) -> Iterator[Problem]:
    """What a schema can't state. Parts of the wrong type, which the schema complains of, are passed over."""
    names: dict[str, int] = {}
    for index, spec in enumerate(_items(document)):
        if not isinstance(spec, dict):
            continue
        name = spec.get("model_name")
        if isinstance(name, str) and names.setdefault(name, index) != index:
            yield Problem(
                f"[{index}].model_name",
                f"{shown(name)} is the name of [{names[name]}] already; names must differ",
            )
        yield from _placement_problems(f"[{index}]", spec)
        yield from _sleep_problems(f"[{index}]", spec)


def _placement_problems(where: str, spec: dict[str, Any]) -> Iterator[Problem]:
    tp_size = spec.get("tp_size", 1)
    taken: dict[int, str] = {}
    for index, placement in enumerate(_items(spec.get("init_placements"))):
        gpu_ids = placement.get("gpu_ids") if isinstance(placement, dict) else None
        if not isinstance(gpu_ids, list) or not all(type(gpu) is int for gpu in gpu_ids):
            continue
        here = f"{where}.init_placements[{index}].gpu_ids"
        if type(tp_size) is int and tp_size >= 1 and gpu_ids and len(gpu_ids) != tp_size:
            found = f"{shown(gpu_ids)} names {len(gpu_ids)} GPU(s)"
            yield Problem(here, f"{found}; allowed: as many as tp_size, which is {tp_size}")
        for gpu in gpu_ids:
            if taken.setdefault(gpu, here) != here:
                yield Problem(here, f"GPU {gpu} is in {taken[gpu]} too; allowed: each GPU once a model")


def _sleep_problems(where: str, spec: dict[str, Any]) -> Iterator[Problem]:
    timeout = spec.get("idle_timeout_s")
    if timeout is None:
        return
    awake = "pin is true" if spec.get("pin") is True else ""
    if spec.get("minimum_tier") == "active":
        awake = "minimum_tier is active"
    if awake:
        yield Problem(
            f"{where}.idle_timeout_s",
            f"{shown(timeout)} can have no effect where {awake}; allowed: one of the two",
        )


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _in_file_order(problem: Problem) -> tuple[list[int], Problem]:
    numbers = [part.partition("]")[0] for part in problem.path.split("[")[1:]]
    return [int(number) for number in numbers[:1] if number.isdigit()], problem


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _resolved(spec: ModelSpec, folder: Path) -> ModelSpec:
    def resolve(path: str | None) -> str | None:
        if path is None or Path(path).is_absolute() or not (folder / path).is_dir():
            return path
        return str((folder / path).resolve())

    return msgspec.structs.replace(
        spec, model_path=resolve(spec.model_path) or "", tokenizer_path=resolve(spec.tokenizer_path)
    )
