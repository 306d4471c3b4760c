"""The files that measured figures are kept in: `docs/results/<name>.json`, one form for all benchmarks.

A figure counts when a command beside it made it, so each file says which command, on which commit and
machine, and when. A missed target stays in the file, with a note that says why.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

FIGURE = re.compile(r"[a-z][a-z0-9_]*")
GIT_DEADLINE_S = 30.0
COMMIT_VARIABLE = "PRISM_COMMIT"

Better = Literal["lower", "higher", "equal"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `figure` is an id in lower case with the unit as suffix; `met` is None without a target."""

    figure: str
    value: float | int | None
    unit: str
    target: float | int | None = None
    met: bool | None = None
    note: str = ""


def row(
    figure: str,
    value: float | int | None,
    unit: str,
    *,
    target: float | int | None = None,
    better: Better = "lower",
    note: str = "",
) -> Row:
    """A row, judged: `better` says which side of `target` is good (the target itself always is).

    A value of None stands for a figure that could not be measured, which misses any target; the note says
    why. Raises ValueError for an id that programs could not rely on.
    """
    if not FIGURE.fullmatch(figure):
        raise ValueError(f"figure {figure!r}: lower case letters, digits and _ only, a letter first")
    met: bool | None = None
    if target is not None:
        met = value is not None and (
            value == target
            or (better == "lower" and value < target)
            or (better == "higher" and value > target)
        )
    return Row(figure, value, unit, target, met, note)


def write_results(
    name: str,
    rows: Sequence[Row],
    *,
    command: str,
    root: Path,
    packages: Iterable[str] = (),
    versions: Mapping[str, str] | None = None,
    details: Mapping[str, object] | None = None,
) -> Path:
    """Write `<root>/docs/results/<name>.json` and return its path; `root` is the repository.

    `packages` are installed distributions whose versions matter, `versions` those of anything else,
    `details` what else belongs beside the rows (tables, parameters, seeds). Raises ValueError when two rows
    share an id.
    """
    figures = [each.figure for each in rows]
    doubled = sorted({figure for figure in figures if figures.count(figure) > 1})
    if doubled:
        raise ValueError(f"figures that occur twice: {', '.join(doubled)}")
    content: dict[str, object] = {
        "command": command,
        "commit": commit(root),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {**installed_versions(packages), **(versions or {})},
        "rows": [asdict(each) for each in rows],
    }
    if details:
        content["details"] = dict(details)
    path = root / "docs" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    beside.replace(path)
    return path


def commit(root: Path) -> str:
    """The commit of the tree at `root`, with `-dirty` behind it when anything but results differs from it.

    A copy is told by PRISM_COMMIT, whatever history it has or lacks; without either the answer is "unknown".
    """
    told = os.environ.get(COMMIT_VARIABLE)
    if told:
        return told
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)docs/results")
    return head if changed == "" else f"{head}-dirty"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_DEADLINE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def machine() -> dict[str, object]:
    """What this was measured on: processor, cores that this process may use, memory, system, GPUs."""
    found: dict[str, object] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
    if gpus := _gpus():
        found["gpus"] = gpus
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=GIT_DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in run.stdout.splitlines() if line.strip()]


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Python and `packages`, each with its version or "not installed"."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def missed(rows: Iterable[Row]) -> list[Row]:
    """The rows whose target was not met."""
    return [each for each in rows if each.met is False]


def table(rows: Iterable[Row]) -> str:
    """`rows` for a terminal, one a line: figure, value, unit, and how it stands to its target."""
    lines = []
    for each in rows:
        value = "-" if each.value is None else f"{each.value:,.3f}".rstrip("0").rstrip(".")
        verdict = ""
        if each.target is not None:
            verdict = f"{'meets' if each.met else 'MISSES'} {each.target:g}"
        lines.append(f"{each.figure:>44} {value:>14} {each.unit:<12} {verdict:<16} {each.note}".rstrip())
    return "\n".join(lines)
