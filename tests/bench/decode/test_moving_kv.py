"""When memory has followed demand, by a worker's reports; and the cell itself on tiny models."""

from pathlib import Path

import pytest

from prism.bench.decode.cells import cells
from prism.bench.decode.moving_kv import follow_s
from prism.common.messages.load import ModelLoad
from prism.common.messages.models import ModelState

BEGUN = 100


def load(quota: int, wanted: int) -> ModelLoad:
    return ModelLoad("m", ModelState.ACTIVE, kv_quota_bytes=quota, kv_wanted_bytes=wanted)


@pytest.mark.core
@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        pytest.param([(0.0, load(100, 90)), (1.0, load(100, 100))], None, id="no more demand than there was"),
        pytest.param([(0.0, load(100, 500)), (1.0, load(100, 500))], None, id="no memory came"),
        pytest.param([(1.0, load(500, 500))], 0.0, id="reported once it had come"),
        pytest.param(
            [(1.0, load(100, 300)), (1.2, load(200, 300)), (1.5, load(300, 900))], 0.5, id="covered"
        ),
        pytest.param(
            [(1.0, load(100, 900)), (1.1, load(400, 900)), (2.0, load(350, 0))], 0.1, id="all of it"
        ),
    ],
)
def test_memory_has_followed_when_it_covers_what_was_asked_for_first(
    loads: list[tuple[float, ModelLoad]], expected: float | None
) -> None:
    found = follow_s(loads, BEGUN)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.engine
async def test_memory_of_tiny_models_moves_and_no_answer_is_cut(tmp_path: Path) -> None:
    cell = cells(tmp_path / "models", tmp_path / "cell.log")["moving_kv_tiny"]
    rows = {row.figure: row.value for row in await cell()}
    assert rows["moving_kv_tiny_answers_cut"] == 0
    assert rows["moving_kv_tiny_reports_over_limit"] == 0
    for model in ("tiny_llama", "tiny_qwen3"):
        assert rows[f"moving_kv_tiny_{model}_follow_s"] is not None
        # Each had more than half at a time: it was the other's before.
        peak = rows[f"moving_kv_tiny_{model}_peak_gb"]
        assert peak is not None
        assert peak > 0.045 / 2
