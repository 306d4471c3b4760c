"""The decode benchmark on a CPU: real SGLang by itself, and a real system, on a tiny model."""

import dataclasses
from pathlib import Path

import pytest
from tests.conftest import MODELS_FOLDER

from prism.bench.decode import cells as module
from prism.bench.decode.cells import cells, decode_cell, rates
from prism.bench.decode.measured_systems import ON_CPU
from prism.bench.decode.plain_engine import Batch, Generated

pytestmark = pytest.mark.engine


async def test_a_tiny_model_says_under_a_worker_what_it_says_by_itself(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKED_PROMPTS", 4)
    models = tmp_path / "models"
    models.mkdir()
    (models / "tiny").symlink_to(MODELS_FOLDER)
    scale = dataclasses.replace(ON_CPU, streams=(2,), long_tokens=20, repeats=1)
    rows = {row.figure: row for row in await decode_cell("tiny", scale, models, tmp_path / "cell.log")}
    assert rows["decode_mismatches_tiny"].value == 0
    assert "4 of 4 answers equal" in rows["decode_mismatches_tiny"].note
    assert rows["decode_woken_mismatches_tiny"].value == 0
    # Of a few tokens in a single repeat on a busy machine any ratio may come.
    assert rows["decode_ratio_tiny_2"].value is not None


class Turns:
    """A side that takes a second a token, and notes that it was its turn."""

    def __init__(self, name: str, turns: list[tuple[str, int]]) -> None:
        self._name = name
        self._turns = turns

    async def generate(self, batch: Batch) -> Generated:
        self._turns.append((self._name, batch.tokens))
        return Generated(float(batch.tokens), [])


@pytest.mark.core
async def test_sides_take_turns_so_that_a_slow_while_is_a_slow_while_for_both() -> None:
    turns: list[tuple[str, int]] = []
    scale = dataclasses.replace(ON_CPU, streams=(2,), short_tokens=1, long_tokens=5, repeats=1)
    assert await rates([Turns("a", turns), Turns("b", turns)], scale) == {2: [2.0, 2.0]}
    assert turns == 2 * [("a", 1), ("a", 5), ("b", 1), ("b", 5)]


def test_the_cells_have_the_names_that_the_makefile_runs(tmp_path: Path) -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    line = next(line for line in makefile.splitlines() if line.startswith("DECODE_CELLS"))
    assert set(line.partition(":=")[2].split()) <= set(cells(tmp_path, tmp_path / "log"))
