"""How long a plan takes on a large cluster, and how that grows with it."""

import math
import random
import statistics
from time import process_time

import msgspec

from prism.common.garbage import garbage_collected_later
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.scheduling.cost import GpuProfile
from prism.scheduling.memory import kv_floor, weights_bytes
from prism.scheduling.placement import policies
from prism.scheduling.placement.snapshot import ClusterSnapshot, Demand, ModelView, ResidentModel, WorkerView
from prism.scheduling.traffic import Traffic

SIZES = (1_000, 2_000, 5_000, 10_000)
MODELS_PER_GPU = 10
TARGET_S = 1.0
NEAR_LINEAR = 1.25
"""The exponent of growth that counts as close to linear."""

_GB = 10**9
_PARAMETERS = (1.2, 3.2, 8.0, 14.0, 32.0)
_WEIGHTS = (35, 30, 25, 7, 3)
_GPU = GpuProfile(
    "80 GB",
    80 * _GB,
    operations_per_s=4e14,
    memory_bytes_per_s=2.5e12,
    bus_bytes_per_s=5e10,
    wake_fixed_s=0.05,
    shell_s=0.5,
    context_bytes=_GB // 2,
)


class PlanTime(msgspec.Struct, frozen=True):
    """One cluster's figures: the median of several plans, in seconds of one core."""

    policy: str
    case: str
    models: int
    gpus: int
    seconds: float
    actions: int


def large_cluster(models: int, *, seed: int = 1, cold: bool = False) -> ClusterSnapshot:
    """`models` models of 1 to 32 billion parameters on a tenth as many GPUs of 80 GB, each a worker.

    Most of what fits is active, with power-law traffic; 2% of the models have requests parked. With `cold`
    nothing is active yet and all of them have: the first plan of a cluster.
    """
    draw = random.Random(seed)
    views: dict[str, ModelView] = {}
    for number in range(models):
        name = f"m{number}"
        billions = draw.choices(_PARAMETERS, _WEIGHTS)[0]
        facts = ModelFacts(
            name,
            parameters=int(billions * _GB),
            kv_elements_per_token=int(16384 * billions**0.5),
            context_length=8192,
            checkpoint_dtype="bfloat16",
        )
        rate = 0.02 * draw.paretovariate(1.1)
        rate = min(rate, 4.0)
        traffic = Traffic(rate, rate * 400, rate * 200, draw.expovariate(rate), 1 / rate)
        spec = ModelSpec(name, f"/{name}", ttft_slo_ms=1000.0, tpot_slo_ms=60.0)
        views[name] = ModelView(spec, facts, started=True, traffic=traffic)
    gpus = max(1, models // MODELS_PER_GPU)
    residents: list[dict[str, ResidentModel]] = [{} for _ in range(gpus)]
    reserved = [0] * gpus
    for number, (name, view) in enumerate(views.items()):
        gpu = number % gpus
        assert view.facts is not None
        weights, kv = weights_bytes(view.facts, None), kv_floor(view.spec, view.facts, None)
        takes = weights + kv + _GPU.context_bytes
        fits = not cold and reserved[gpu] + takes <= 0.9 * _GPU.memory_bytes
        busy = fits and draw.random() < 0.3
        reserved[gpu] += takes if fits else 0
        residents[gpu][name] = ResidentModel(
            ModelState.ACTIVE if fits else ModelState.STAGED,
            running=int(busy),
            weights_bytes=weights if fits else 0,
            kv_quota_bytes=kv if fits else 0,
            idle_s=0.0 if busy else view.traffic.last_arrival_s,
            state_s=60.0,
        )
    workers = tuple(
        WorkerView(
            f"w{number:04}",
            f"n{number // 8}",
            "cuda",
            (number,),
            _GPU.memory_bytes,
            reserved[number],
            models=residents[number],
            profile=_GPU,
            elastic=True,
        )
        for number in range(gpus)
    )
    sleeping = [
        name for resident in residents for name, model in resident.items() if model.state is ModelState.STAGED
    ]
    parked = sleeping if cold else draw.sample(sleeping, min(len(sleeping), models // 50))
    demand = {name: Demand(1, draw.uniform(0.0, 1.0)) for name in parked}
    return ClusterSnapshot(workers, views, demand)


def plan_time(policy: str, models: int, *, cold: bool = False, repeats: int = 3) -> PlanTime:
    """The time of a plan by `policy`, made as the global scheduler makes it; the first, which also fills what
    is remembered of costs, is not counted unless the cluster is `cold`."""
    snapshot = large_cluster(models, cold=cold)
    placement = policies[policy]()
    times, actions = [], 0
    for _ in range(repeats + (not cold)):
        began = process_time()
        with garbage_collected_later():
            plan = placement.plan(snapshot, 1000.0)
        times.append(process_time() - began)
        actions = len(plan.actions)
    counted = times if cold else times[1:]
    case = "cold start" if cold else "running"
    return PlanTime(policy, case, models, len(snapshot.workers), statistics.median(counted), actions)


def plan_times(policy: str = "balanced", sizes: tuple[int, ...] = SIZES) -> list[PlanTime]:
    """All sizes, running and from a cold start."""
    return [plan_time(policy, size, cold=cold) for cold in (False, True) for size in sizes]


def growth(points: list[PlanTime]) -> float:
    """The exponent of growth between the smallest and the largest cluster: 1 is linear."""
    small, large = min(points, key=lambda p: p.models), max(points, key=lambda p: p.models)
    return math.log(large.seconds / small.seconds) / math.log(large.models / small.models)
