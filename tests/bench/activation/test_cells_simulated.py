"""The cells that need a GPU, run over the simulated device: what they command and read is real, what the
driver counts is stood in for."""

import os
from functools import partial
from pathlib import Path

import pytest

from prism.bench.activation import commanded_system as commanding
from prism.bench.activation import freezing, random_models, starting, waking, woken
from prism.bench.activation.cells import cells
from prism.bench.activation.commanded_system import commanded_system
from prism.bench.activation.footprint import footprint_cell
from prism.bench.activation.random_models import Shape
from prism.bench.results import Row

SMALL = Shape("llama", 64, 128, 2, 4, 2, 16, 2000, tied=False)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device in place of a GPU, small models in place of large ones."""
    simulated = partial(commanded_system, device="simulated", worker_memory_gb=1.0, store_memory_gb=1.0)
    monkeypatch.setattr(woken, "commanded_system", simulated)
    for size in ("1b", "3b", "8b"):
        monkeypatch.setitem(random_models.SHAPES, size, SMALL)
    held = {os.getpid(): 900 * MIB}
    for module in (waking, freezing):
        monkeypatch.setattr(module, "engine_pid", lambda _: os.getpid())
    monkeypatch.setattr(waking, "gpu_used_bytes", lambda: held)
    monkeypatch.setattr(freezing, "gpu_used_bytes", dict)
    monkeypatch.setattr(waking, "pinned_bandwidth", lambda: 50e9)
    monkeypatch.setattr(woken, "KV_GB", 0.1)
    for module, name in ((waking, "WAKES"), (freezing, "FREEZES"), (starting, "STARTS")):
        monkeypatch.setattr(module, name, 2)
    monkeypatch.setattr(starting, "GRAPHS_BEHIND_S", 0.1)
    monkeypatch.setattr(commanding, "PIN_DEADLINE_S", 0.1)
    monkeypatch.setenv("PRISM_SIMULATED_DECODE_STEP_MS", "1")
    monkeypatch.setenv("PRISM_BENCH_CYCLES", "6")


async def measured(name: str, folder: Path) -> dict[str, Row]:
    """The rows of a cell, by figure."""
    rows = await cells(folder / "models", folder / f"{name}.log")[name]()
    return {row.figure: row for row in rows}


async def test_waking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The simulated device has no image to write, nor to pin.
    monkeypatch.setattr(commanding, "DISK_DEADLINE_S", 0.1)
    rows = await measured("wake_8b", tmp_path)
    note = rows["wake_8b_first_token_s"].note
    assert note.endswith("the image was not on disk by then; it was not pinned by then")
    assert rows["wake_8b_mismatches"].value == 0
    assert (rows["dozing_footprint_mib"].value, rows["dozing_footprint_mib"].met) == (900, False)
    assert {"wake_8b_first_token_s", "wake_8b_copy_share", "doze_8b_s"} <= rows.keys()


async def test_waking_in_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The simulated device has no ranks.
    on_cpu = partial(commanded_system, device="cpu", worker_memory_gb=1.0, store_memory_gb=1.0)
    monkeypatch.setattr(woken, "commanded_system", on_cpu)
    rows = await measured("wake_8b_tp2", tmp_path)
    assert rows["wake_8b_tp2_mismatches"].value == 0
    assert {"wake_8b_tp2_first_token_s", "wake_8b_tp2_copy_share", "doze_8b_tp2_s"} <= rows.keys()
    assert "dozing_footprint_mib" not in rows, "that is an engine's on one GPU"


async def test_waking_over_two_buses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commanding, "DISK_DEADLINE_S", 0.1)
    rows = await measured("wake_8b_over_2_buses", tmp_path)
    assert rows["wake_8b_over_2_buses_mismatches"].value == 0
    assert "at 100.0 GB/s" in rows["wake_8b_over_2_buses_first_token_s"].note
    assert rows["wake_8b_over_2_buses_copy_share"].note.startswith("of 2 times the pinned bandwidth")


async def test_freezing(tmp_path: Path) -> None:
    rows = await measured("freeze_8b", tmp_path)
    assert rows["frozen_footprint_mib"].met
    assert rows["thaw_8b_mismatches"].value == 0
    freeze_s, thaw_s = rows["freeze_8b_s"].value, rows["thaw_8b_first_token_s"].value
    assert freeze_s is not None
    assert thaw_s is not None
    assert freeze_s >= 0.1, "what the simulated device takes"
    assert thaw_s >= 0.05
    assert {"freeze_8b_checkpoint_s", "thaw_8b_restore_s", "thaw_8b_copy_s"} <= rows.keys()


async def test_starting(tmp_path: Path) -> None:
    staged = await measured("staged_8b", tmp_path)
    assert staged["staged_8b_mismatches"].value == 0
    assert {"staged_8b_first_token_s", "staged_8b_stage_s", "staged_8b_decode_tok_per_s"} <= staged.keys()
    cold = await measured("cold_start", tmp_path)
    assert {"cold_start_s", "cold_start_up_s", "cold_start_imaged_s"} <= cold.keys()


async def test_cycles_over_three_models(tmp_path: Path) -> None:
    rows = await measured("cycles", tmp_path)
    assert (rows["cycles"].value, rows["cycles_mismatches"].value) == (6, 0)
    assert rows["cycles_gpu_growth_pct"].value == 0


async def test_an_engine_that_notes_nothing_has_no_footprint(tmp_path: Path) -> None:
    (row,) = await footprint_cell("as_it_is", "8b", tmp_path / "models", tmp_path / "log")
    assert (row.figure, row.value) == ("footprint_as_it_is_mismatches", 0)
