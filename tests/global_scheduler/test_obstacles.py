"""Which models no request would wake as things are: said when asked, without a request that waits."""

import asyncio
from typing import TYPE_CHECKING

import pytest

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.explain import ExplainReply, ExplainRequest
from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import CommandKind
from prism.global_scheduler.obstacles import LARGEST_SHARE, LEAST_S, Outlook, obstacles
from prism.scheduling.placement import BalancedPlacement, PlacementPolicy, StaticPlacement
from prism.scheduling.placement.lru import LruPlacement
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    InFlight,
    ModelView,
    ResidentModel,
    WorkerView,
)

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import Register, SchedulerFactory, WorkerFactory

pytestmark = pytest.mark.core

NOW = 1000.0
OFF = [InitialPlacement([0], on=False)]
DYNAMIC: list[PlacementPolicy] = [LruPlacement(), BalancedPlacement()]


def model(name: str = "m", size: int = 40, **spec: object) -> ModelView:
    facts = ModelFacts(name, parameters=size, kv_elements_per_token=1, context_length=5)
    return ModelView(ModelSpec(name, f"/{name}", **spec), facts)  # type: ignore[arg-type]


def worker(*gpu_ids: int, name: str = "w", limit: int = 100, **models: ModelState) -> WorkerView:
    there = {
        model: ResidentModel(state, weights_bytes=40, kv_quota_bytes=10) for model, state in models.items()
    }
    return WorkerView(name, "node", "simulated", gpu_ids, limit, 50 * len(there), 1, models=there)


def told(policy: PlacementPolicy, *parts: WorkerView | ModelView, **more: object) -> dict[str, str]:
    workers = tuple(part for part in parts if isinstance(part, WorkerView))
    views = {part.spec.model_name: part for part in parts if isinstance(part, ModelView)}
    snapshot = ClusterSnapshot(workers, views, **more)  # type: ignore[arg-type]
    return {note.model: note.text for note in obstacles(policy, snapshot, NOW)}


@pytest.mark.parametrize("policy", DYNAMIC)
def test_a_model_for_more_gpus_than_any_worker_has(policy: PlacementPolicy) -> None:
    found = told(policy, worker(0), model("wide", tp_size=2), model("slim"))
    assert found == {"wide": "waits for a worker; none is there with 2 GPU(s)"}
    assert told(policy, worker(0, 1), model("wide", tp_size=2)) == {}


@pytest.mark.parametrize("policy", DYNAMIC)
def test_a_model_that_no_worker_could_ever_hold(policy: PlacementPolicy) -> None:
    assert "too large" in told(policy, worker(0), model(size=1000))["m"]


@pytest.mark.parametrize("policy", DYNAMIC)
def test_a_request_wakes_what_is_off_or_must_wait_for_memory_or_has_its_home_elsewhere(
    policy: PlacementPolicy,
) -> None:
    full = worker(0, a=ModelState.ACTIVE, b=ModelState.ACTIVE)
    others = (model("a"), model("b"))
    assert told(policy, full, *others, model("m", init_placements=OFF)) == {}
    assert told(policy, full, *others, model("m", init_placements=[InitialPlacement([7])])) == {}


@pytest.mark.parametrize("shares_kv", [False, True])
def test_where_nothing_wakes_what_is_off_stays_off(*, shares_kv: bool) -> None:
    found = told(StaticPlacement(shares_kv), worker(0), model(init_placements=OFF), model("home"))
    assert list(found) == ["m"]
    assert found["m"].startswith("stays off")


@pytest.mark.parametrize("policy", [*DYNAMIC, StaticPlacement()])
def test_a_model_that_serves_or_is_on_its_way_up_lacks_nothing(policy: PlacementPolicy) -> None:
    replicated = model(replicas=2, init_placements=[InitialPlacement([0]), InitialPlacement([7])])
    assert told(policy, worker(0), replicated) == {}
    assert told(policy, worker(0, m=ModelState.ACTIVE), replicated) == {}
    assert told(policy, worker(0, m=ModelState.WAKING), replicated) == {}
    rising = (InFlight("w", "m", CommandKind.ACTIVATE, 50),)
    assert told(policy, worker(0), replicated, in_flight=rising) == {}


@pytest.mark.parametrize("policy", DYNAMIC)
def test_requests_that_wait_already_change_nothing(policy: PlacementPolicy) -> None:
    demand = {"m": Demand(3, 60.0, 60.0)}
    assert "none is there" in told(policy, worker(0), model(tp_size=2), demand=demand)["m"]


def test_what_a_store_said_of_a_folder_gateways_know_from_itself() -> None:
    unread = ModelView(ModelSpec("unread", "/unread"))
    broken = ModelView(ModelSpec("broken", "/broken"), ModelFacts("broken", error="no config.json"))
    assert told(LruPlacement(), worker(0), unread, broken) == {}
    assert told(StaticPlacement(), worker(0), unread, broken) == {}


def test_looking_for_them_takes_a_small_part_of_the_time_however_often_somebody_asks() -> None:
    now, looks, takes_s = NOW, 0, 0.0
    outlook = Outlook(LruPlacement(), lambda: now)

    def snapshot() -> ClusterSnapshot:
        nonlocal now, looks
        looks += 1
        now += takes_s
        wide = model("wide", tp_size=2)
        return ClusterSnapshot((worker(0),), {"wide": wide})

    def looks_within(seconds: float) -> int:
        nonlocal now
        before, end = looks, now + seconds
        while now < end:
            assert [note.model for note in outlook.look(snapshot)] == ["wide"]
            now += 0.01
        return looks - before

    assert looks_within(10.0) == pytest.approx(10.0 / LEAST_S, abs=1)
    takes_s = 1.0
    assert looks_within(100.0) * takes_s == pytest.approx(100.0 * LARGEST_SHARE, abs=1)


async def asked(bus: Bus, instance: str = "") -> ExplainReply:
    request = ExplainRequest(obstacles=True)
    return await bus.request(subjects.scheduler_explain(instance), request, ExplainReply, timeout_s=5)


async def test_the_leader_tells_whoever_is_asked(
    scheduler: "SchedulerFactory", scripted_worker: "WorkerFactory", register_model: "Register", bus: Bus
) -> None:
    await register_model("slim", 60)
    await register_model("wide", 60, tp_size=2)
    async with scripted_worker(), scheduler("one"), scheduler("two"), asyncio.timeout(15):
        while (reply := await asked(bus)).obstacles == []:
            continue
        assert (reply.instance, reply.models) == ("one", [])
        assert [(note.model, note.text) for note in reply.obstacles] == [
            ("wide", "waits for a worker; none is there with 2 GPU(s)")
        ]
        assert (await asked(bus, "two")).obstacles == [], "a standby that decides nothing knows nothing"
