"""How the comparison judges what the cells came to."""

from typing import Any

import pytest

from prism.bench.scheduling.__main__ import area, compared, fleets
from prism.bench.scheduling.admission_experiment import compare
from prism.bench.scheduling.cells import Cell
from prism.bench.scheduling.workloads import EIGHTEEN, FIFTY_EIGHT, workload
from prism.bench.simulation.model_config import read_model_facts

pytestmark = pytest.mark.core


def test_the_area_is_a_share_of_the_rectangle() -> None:
    assert area({1.0: 1.0, 2.0: 1.0, 4.0: 1.0}) == 1.0
    assert area({0.0: 1.0, 2.0: 0.0}) == 0.5
    assert area({0.0: 1.0, 1.0: 1.0, 3.0: 0.0}) == pytest.approx(2 / 3)


def test_a_case_fails_when_any_policy_is_above_balanced() -> None:
    load = workload("8_models")
    found = {
        ("8_models", 2, "balanced", 0): {1.0: 1.0, 2.0: 0.99, 3.0: 0.50},
        ("8_models", 2, "static", 0): {1.0: 1.0, 2.0: 0.30, 3.0: 0.53},
        ("8_models", 2, "lru", 0): {1.0: 0.9, 2.0: 0.60, 3.0: 0.10},
    }
    rows, failed = compared(found, load)
    by_figure = {row.figure: row for row in rows}
    assert by_figure["at_the_top_8_models_share"].value == pytest.approx(2 / 3, abs=1e-4)
    assert by_figure["below_the_best_8_models_points"].value == pytest.approx(3.0)
    assert "seed 0 at 3 times the rate" in by_figure["below_the_best_8_models_points"].note
    assert by_figure["over_static_at_99_8_models_ratio"].value == pytest.approx(3.3)
    assert failed == [
        {"workload": "8_models", "gpus": 2, "seed": 0, "rate": 3.0, "balanced": 0.50, "static": 0.53}
    ]


def test_a_fleet_that_no_number_was_enough_for_counts_as_the_limit() -> None:
    most = workload("8_models").most_gpus
    cells: list[tuple[Cell, dict[str, Any]]] = [
        (Cell("gpus", "8_models", "balanced", 0), {"gpus": 2}),
        (Cell("gpus", "8_models", "static", 0), {"gpus": None}),
    ]
    by_figure = {row.figure: row for row in fleets(cells)}
    assert by_figure["gpus_8_models_static"].value == most
    assert by_figure["gpus_8_models_over_static_ratio"].value == pytest.approx(2 / most)


def test_the_workloads_are_the_ones_asked_for() -> None:
    def billions(names: tuple[str, ...]) -> list[float]:
        return sorted(read_model_facts(name, name).parameters / 1e9 for name in names)

    assert len(EIGHTEEN) == 18
    assert billions(EIGHTEEN)[0] > 1
    assert billions(EIGHTEEN)[-1] < 8.1
    sizes = billions(FIFTY_EIGHT)
    classes = ((1, 3.5), (3.5, 9), (9, 30.5), (30.5, 71))
    assert [sum(low <= size < high for size in sizes) for low, high in classes] == [43, 8, 3, 4]


def test_fleets_are_sized_where_models_come_and_go_as_often_as_they_do_in_the_papers_traces() -> None:
    for name in ("8_models", "18_models", "58_models"):
        load = workload(name)
        assert 54 <= load.changes_per_hour * load.fleet_rate <= 766


def test_moore_hodgson_keeps_more_of_the_tight_objectives_than_first_come() -> None:
    found = compare(0.9, seed=3)
    assert found["moore_hodgson"]["tight"] >= 1.4 * found["first_come"]["tight"]
    assert found["moore_hodgson"]["unserved"] == 0
