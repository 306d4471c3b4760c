"""Cost profiles that come with Prism: what kinds of GPU reach, known by name to schedulers and the simulator.

Package data, read once; nothing here decides anything. `prism calibrate` makes more of them.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec

from prism.scheduling.cost import GpuProfile

FOLDER = Path(str(files("prism.scheduling.profiles")))


def profile_names() -> list[str]:
    """The profiles that come with Prism."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def shipped_profiles() -> Mapping[str, GpuProfile]:
    """All of them, by name."""
    return {
        name: msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=GpuProfile)
        for name in profile_names()
    }
