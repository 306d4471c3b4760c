"""The cells of the activation benchmark that need no GPU, and the names of all."""

from pathlib import Path

import pytest

from prism.bench.activation.cells import cells
from prism.bench.activation.raw_rates import copy_rate, drop_cached, read_rate
from prism.bench.activation.staging import staged_rows, thread_counts


def test_the_cells_have_the_names_that_the_makefile_runs(tmp_path: Path) -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    line = next(line for line in makefile.splitlines() if line.startswith("ACTIVATION_CELLS"))
    assert set(line.partition(":=")[2].split()) <= set(cells(tmp_path, tmp_path / "log"))


async def test_a_tiny_checkpoint_is_staged_from_disk_and_cache_and_held_against_this_host(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "tiny").symlink_to(next(iter(tiny_models.values())).parent)
    rows = {row.figure: row for row in await cells(models, tmp_path / "log")["stage_tiny"]()}
    for figure in ("stage_tiny_s", "stage_tiny_cached_s", "stage_tiny_disk_1_threads_s"):
        seconds = rows[figure].value
        assert seconds is not None
        assert 0 < seconds < 60
    assert rows["stage_tiny_disk_share"].target == 0.9


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [1, 2]), (2, [1, 2]), (8, [1, 4, 8]), (16, [1, 4, 16]), (32, [1, 4, 16])]
)
def test_staging_is_measured_with_one_thread_some_and_as_many_as_help(
    monkeypatch: pytest.MonkeyPatch, cores: int, counts: list[int]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert thread_counts() == counts


def test_a_source_is_held_against_its_own_limit() -> None:
    best = {"disk": (2.0, 4), "cached": (1.0, 8)}
    rows = {row.figure: row for row in staged_rows("8b", 16_000_000_000, best, 10e9, 20e9)}
    assert rows["stage_8b_s"].value == 2.0
    assert (rows["stage_8b_disk_share"].value, rows["stage_8b_disk_share"].met) == (0.8, False)
    assert (rows["stage_8b_cached_share"].value, rows["stage_8b_cached_share"].met) == (0.8, None)
    assert "by 8 threads" in rows["stage_8b_cached_s"].note


@pytest.mark.parametrize("threads", [1, 3])
def test_rates_count_every_byte_once(tmp_path: Path, threads: int) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"x" * 20_000_001)
    drop_cached(files)
    assert 1e6 < read_rate(files, threads) < 1e12
    assert 1e6 < copy_rate(20_000_001, threads) < 1e12
