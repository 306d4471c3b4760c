"""A missed target says why, and a stored command is one that can be run."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from prism.bench.scheduling import __main__ as comparison
from prism.bench.scheduling.plan_time import PlanTime

pytestmark = pytest.mark.core


def test_a_plan_that_takes_too_long_says_of_which_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = {("running", 1_000): 0.1, ("running", 10_000): 0.5, ("cold start", 10_000): 1.5}
    plans = [PlanTime("balanced", case, size, size // 10, took, 0) for (case, size), took in seconds.items()]
    speed: dict[str, Any] = {
        "seconds": 1.0,
        "requests_per_s": 1.0,
        "both_attainment": 1.0,
        "longest_queue": 1,
    }
    speed |= {"admission_decisions": 1, "plans": 1}
    decision = SimpleNamespace(load="mixed", median_s=0.001, worst_s=0.002)
    monkeypatch.setattr(comparison, "plan_times", lambda: plans)
    monkeypatch.setattr(comparison, "simulator_speed", lambda *_, **__: speed)
    monkeypatch.setattr(comparison, "worker_admission_times", lambda *_: [decision])
    monkeypatch.setattr(comparison, "plot_lines", lambda *_, **__: None)
    rows = {each.figure: each for each in comparison.speed_rows(tmp_path)}
    slow = rows["plan_10000_models_s"]
    assert (slow.value, slow.met) == (1.5, False)
    assert "1000 GPUs, the slower case: cold start" in slow.note


def test_the_command_that_is_stored_is_that_of_the_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[str] = []

    def stored(_name: str, _rows: object, *, command: str, **_: object) -> Path:
        found.append(command)
        return tmp_path

    monkeypatch.setattr(comparison, "admission_rows", lambda _seeds: [])
    monkeypatch.setattr(comparison, "write_results", stored)
    monkeypatch.setattr(sys, "argv", ["prism.bench.scheduling", "--kind", "admission"])
    run = CliRunner().invoke(comparison.main, ["--kind", "admission", "--root", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert found == ["python -m prism.bench.scheduling --kind admission"]
