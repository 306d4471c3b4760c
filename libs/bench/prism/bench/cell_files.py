"""Cells of a benchmark that were measured apart, and the one file that they become."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from prism.bench.results import Row, commit, installed_versions, machine

PACKAGES = ("sglang", "torch", "kvcached", "nats-py")


def write_cell(path: Path, name: str, rows: Sequence[Row]) -> None:
    """Keep one cell's rows with the commit and machine that they come from."""
    content = {
        "cell": name,
        "commit": commit(Path.cwd()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": installed_versions(PACKAGES),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def is_measured(path: Path, root: Path) -> bool:
    """Whether `path` holds a cell that was measured at the commit of the clean tree `root`."""
    now = commit(root)
    if now == "unknown" or now.endswith("-dirty"):
        return False
    try:
        return bool(json.loads(path.read_text())["commit"] == now)
    except (OSError, ValueError, KeyError):
        return False


def merge_cells(name: str, files: Sequence[Path], root: Path) -> Path:
    """Write `<root>/docs/results/<name>.json` from cells; a figure that several have is kept from the first.

    Cells of several hosts stand in one file when their GPUs are of one kind; it says which cell came from
    which. Raises ValueError when they come from different commits, or kinds of GPU.
    """
    cells = [json.loads(path.read_text()) for path in files]
    for key in ("commit", "versions"):
        if len({json.dumps(cell[key], sort_keys=True) for cell in cells}) > 1:
            values = ", ".join(f"{cell['cell']}: {cell[key]}" for cell in cells)
            raise ValueError(f"these cells do not belong together, their {key} differs: {values}")
    gpus = {", ".join(sorted(set(cell["machine"].get("gpus", [])))) for cell in cells}
    if len(gpus) > 1:
        raise ValueError(f"these cells were measured on different GPUs: {' and '.join(sorted(gpus))}")
    rows: dict[str, object] = {}
    for cell in cells:
        for row in cell["rows"]:
            rows.setdefault(row["figure"], row)
    content = {
        "command": f"make bench-{name} CELLS='{' '.join(cell['cell'] for cell in cells)}'",
        "commit": cells[0]["commit"],
        "date": max(cell["date"] for cell in cells),
        "machine": cells[0]["machine"],
        "versions": cells[0]["versions"],
        "rows": list(rows.values()),
    }
    if any(cell["machine"] != cells[0]["machine"] for cell in cells):
        content["details"] = {"machines": {cell["cell"]: cell["machine"] for cell in cells}}
    path = root / "docs" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path
