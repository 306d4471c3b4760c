"""What engines note of their memory (PRISM_TRACE_FOOTPRINT), read from a log."""

import re
from collections.abc import Iterable

from prism.bench.results import Row, row

LINE = re.compile(r"footprint (\w+): (-?\d+) MiB by the driver, (\d+) reserved by torch, (\d+) in use")


def footprint_rows(name: str, size: str, lines: Iterable[str]) -> list[Row]:
    """A row for each stage that the engine of `size` noted, in order; the last of those that come again."""
    noted: dict[str, tuple[int, int, int]] = {}
    for line in lines:
        found = LINE.search(line)
        if found:
            noted[found[1]] = (int(found[2]), int(found[3]), int(found[4]))
    return [
        row(f"{name}_{stage}_mib", driver, "MiB", note=f"{size}; torch: {reserved} reserved, {used} in use")
        for stage, (driver, reserved, used) in noted.items()
    ]
