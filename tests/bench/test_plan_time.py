"""Plans of large clusters: their work grows about linearly, and the benchmark's cluster is a possible one."""

import math
import sys

import pytest

from prism.bench.scheduling.plan_time import MODELS_PER_GPU, NEAR_LINEAR, large_cluster
from prism.common.messages.models import ModelState
from prism.scheduling.placement import policies
from prism.scheduling.placement.snapshot import ClusterSnapshot

pytestmark = pytest.mark.core


def test_the_cluster_of_the_benchmark_is_within_its_memory_and_has_work_to_do() -> None:
    snapshot = large_cluster(500)
    assert len(snapshot.workers) == 500 // MODELS_PER_GPU
    assert all(worker.reserved_bytes <= worker.limit_bytes for worker in snapshot.workers)
    states = {model.state for worker in snapshot.workers for model in worker.models.values()}
    assert states == {ModelState.ACTIVE, ModelState.STAGED}
    assert len(snapshot.demand) == 10


@pytest.mark.parametrize("policy", ["balanced", "kvpr", "memory_per_request"])
def test_a_plans_work_grows_about_linearly(policy: str) -> None:
    few, many = (calls_of_a_plan(policy, large_cluster(models)) for models in (500, 2000))
    assert math.log(many / few, 4) < NEAR_LINEAR, (
        "counted in calls: what a plan takes in seconds, machines say"
    )


def calls_of_a_plan(policy: str, snapshot: ClusterSnapshot) -> int:
    """How many function calls it takes to plan."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    planner = policies[policy]()
    sys.setprofile(count)
    try:
        plan = planner.plan(snapshot, 1000.0)
    finally:
        sys.setprofile(None)
    assert plan.actions
    return calls
