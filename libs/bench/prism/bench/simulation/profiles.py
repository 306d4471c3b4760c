"""Cost profiles: files that say what a kind of GPU reaches, and where that is known from."""

from importlib.resources import files
from pathlib import Path

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.scheduling.cost import GpuProfile

FOLDER = Path(str(files("prism.bench.simulation").joinpath("profiles")))
DEFAULT = "h100-80gb"


def profile_names() -> list[str]:
    """The profiles that come with Prism."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


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


def write_profile(profile: GpuProfile, path: Path) -> None:
    """Write `profile` as a file that `read_profile` reads."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
