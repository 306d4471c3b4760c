"""Plans of large clusters: their time grows about linearly, and the benchmark's cluster is a possible one."""

import pytest

from prism.bench.scheduling.plan_time import MODELS_PER_GPU, growth, large_cluster, plan_time
from prism.common.messages.models import ModelState

pytestmark = pytest.mark.core


def test_the_cluster_of_the_benchmark_is_within_its_memory_and_has_work_to_do() -> None:
    snapshot = large_cluster(500)
    assert len(snapshot.workers) == 500 // MODELS_PER_GPU
    assert all(worker.reserved_bytes <= worker.limit_bytes for worker in snapshot.workers)
    states = {model.state for worker in snapshot.workers for model in worker.models.values()}
    assert states == {ModelState.ACTIVE, ModelState.STAGED}
    assert len(snapshot.demand) == 10


@pytest.mark.parametrize("policy", ["balanced", "kvpr", "memory_per_request"])
def test_a_plans_time_grows_about_linearly(policy: str) -> None:
    points = [plan_time(policy, models) for models in (1000, 4000)]
    assert growth(points) < 1.4, "in seconds of one core, so that a busy machine does not count"
    assert all(point.actions for point in points)
