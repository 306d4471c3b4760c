"""Notes of an engine's memory: only when wanted, in the form that the benchmark reads."""

import logging

import pytest

from prism.bench.activation.footprint_lines import footprint_rows
from prism.gpu_worker.engine import footprint


def test_nothing_is_noted_unless_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(footprint.VARIABLE, raising=False)
    caplog.set_level(logging.INFO)
    footprint.note("context")
    assert not caplog.text


def test_what_is_noted_is_what_the_benchmark_reads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(footprint.VARIABLE, "1")
    caplog.set_level(logging.INFO)
    footprint.note("context")
    footprint.note("weights")
    rows = footprint_rows("footprint", "8b", caplog.text.splitlines())
    assert [row.figure for row in rows] == ["footprint_context_mib", "footprint_weights_mib"]
    assert all(row.unit == "MiB" for row in rows)


def test_a_stage_that_comes_again_counts_as_it_was_last() -> None:
    lines = [
        f"engine footprint dozing: {mib} MiB by the driver, 148 reserved by torch, 112 in use"
        for mib in (9, 7)
    ]
    (row,) = footprint_rows("footprint", "8b", lines)
    assert (row.value, row.note) == (7, "8b; torch: 148 reserved, 112 in use")
