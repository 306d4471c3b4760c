"""The search that gives baselines their initial placement."""

from pathlib import Path

import pytest

from prism.bench.simulation.initial_placement import model_loads, searched_placements
from prism.bench.simulation.profiles import read_profile
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import Scenario, make_scenario, read_models, simulate
from prism.bench.traces.reading import read_trace

pytestmark = pytest.mark.core

EXAMPLES = Path(__file__).parents[3] / "examples" / "simulated"


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    profile = read_profile("h100-80gb")
    models = read_models(EXAMPLES / "8_models_2_gpus.json", profile)
    return make_scenario(read_trace([EXAMPLES / "trace.csv"]), models, profile, 80 * 10**9)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_every_model_that_fits_has_a_home_within_memory(scenario: Scenario, gpus: int) -> None:
    specs = searched_placements(scenario, gpus=gpus, policy="static", seed=0)
    used = [0.0] * gpus
    for spec, model in zip(specs, scenario.models, strict=True):
        (placement,) = spec.init_placements
        assert placement.max_memory_pool_size
        for gpu in placement.gpu_ids:
            used[gpu] += model.cost.weights_bytes + placement.max_memory_pool_size * 1e9
    assert max(used) <= scenario.gpu_memory_bytes


def test_it_is_no_worse_than_the_file(scenario: Scenario) -> None:
    settings = {"gpus": 2, "policy": "lru", "rate_scale": 4.0}
    found = searched_placements(scenario, seed=0, **settings)  # type: ignore[arg-type]
    searched = report(simulate(scenario, placements=found, **settings))  # type: ignore[arg-type]
    given = report(simulate(scenario, **settings))  # type: ignore[arg-type]
    assert searched["both_attainment"] >= given["both_attainment"]


def test_the_hot_and_the_large_are_kept_apart(scenario: Scenario) -> None:
    loads = model_loads(scenario, 1.0)
    heaviest = sorted(range(len(loads)), key=lambda index: -loads[index].share)[:2]
    specs = searched_placements(scenario, gpus=2, policy="lru", seed=0)
    homes = {tuple(specs[index].init_placements[0].gpu_ids) for index in heaviest}
    assert len(homes) == 2
