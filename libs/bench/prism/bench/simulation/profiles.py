"""Cost profiles by name or file: files say what a kind of GPU reaches, and where that is known from."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.scheduling.cost import GpuProfile, ModelCost
from prism.scheduling.profiles import FOLDER, profile_names

DEFAULT = "h100-80gb"


def read_profile(name: str) -> GpuProfile:
    """The profile of that name, or in the file of that path. Raises PrismError(invalid_request)."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(profile_names())
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"profile {name!r}: neither a file nor one of {known}; `prism calibrate` makes one",
        )
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=GpuProfile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"profile {path}: {error}") from error
    rates = (profile.operations_per_s, profile.memory_bytes_per_s, profile.bus_bytes_per_s)
    if min(rates) <= 0 or profile.memory_bytes <= 0:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"profile {path}: rates and memory must be above 0")
    return profile


class _WithModels(msgspec.Struct):
    models: dict[str, ModelCost] = {}


def read_measured_costs(name: str) -> dict[str, ModelCost]:
    """What single models cost as `prism calibrate` measured it, by name; none in a profile of hardware alone.

    Raises PrismError(invalid_request) as `read_profile` does.
    """
    read_profile(name)
    path = FOLDER / f"{name}.json"
    payload = (path if path.is_file() else Path(name)).read_bytes()
    try:
        return msgspec.json.decode(payload, type=_WithModels).models
    except msgspec.DecodeError as error:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"profile {name}: {error}") from error


def write_profile(profile: GpuProfile, path: Path, models: Mapping[str, ModelCost] | None = None) -> None:
    """Write `profile`, and what was measured of single models, as a file that `read_profile` reads."""
    content = msgspec.to_builtins(profile)
    if models:
        content["models"] = msgspec.to_builtins(dict(models))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
