"""Cells that were measured apart become one file only if they belong together."""

import json
from pathlib import Path

import pytest

from prism.bench.cell_files import merge_cells
from prism.bench.results import Row


def cell(folder: Path, name: str, *rows: Row, commit: str = "c", gpus: tuple[str, ...] = ("H200",)) -> Path:
    """A cell's file."""
    path = folder / f"{name}.json"
    content = {
        "cell": name,
        "commit": commit,
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {"gpus": list(gpus)},
        "versions": {"sglang": "1"},
        "rows": [
            {
                "figure": row.figure,
                "value": row.value,
                "unit": row.unit,
                "target": None,
                "met": None,
                "note": "",
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_rows_of_all_cells_stand_in_one_file(tmp_path: Path) -> None:
    first = cell(tmp_path, "a", Row("bandwidth", 55.0, "GB/s"), Row("wake_s", 0.1, "s"))
    second = cell(tmp_path, "b", Row("bandwidth", 54.0, "GB/s"), Row("doze_s", 0.2, "s"))
    merged = json.loads(merge_cells("activation", [first, second], tmp_path).read_text())
    assert merged["command"] == "make bench-activation CELLS='a b'"
    assert [(row["figure"], row["value"]) for row in merged["rows"]] == [
        ("bandwidth", 55.0),
        ("wake_s", 0.1),
        ("doze_s", 0.2),
    ]


def test_cells_of_different_commits_or_gpus_are_refused(tmp_path: Path) -> None:
    one = cell(tmp_path, "a", Row("x", 1, "s"))
    with pytest.raises(ValueError, match="their commit differs: a: c, b: d"):
        merge_cells("activation", [one, cell(tmp_path, "b", commit="d")], tmp_path)
    with pytest.raises(ValueError, match="different GPUs"):
        merge_cells("activation", [one, cell(tmp_path, "b", gpus=("H100",))], tmp_path)


def test_cells_of_hosts_with_one_kind_of_gpu_stand_together(tmp_path: Path) -> None:
    one = cell(tmp_path, "a", Row("x", 1, "s"))
    two = cell(tmp_path, "b", Row("y", 2, "s"), gpus=("H200", "H200"))
    merged = json.loads(merge_cells("activation", [one, two], tmp_path).read_text())
    assert [row["figure"] for row in merged["rows"]] == ["x", "y"]
    assert merged["details"]["machines"] == {"a": {"gpus": ["H200"]}, "b": {"gpus": ["H200", "H200"]}}
