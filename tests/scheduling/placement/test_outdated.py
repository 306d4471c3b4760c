"""An engine of another version of its model than is registered leaves: every policy plans as if it had."""

import msgspec
import pytest

from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement import policies, policy_named
from prism.scheduling.placement.actions import Activate
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    InFlight,
    ModelView,
    ResidentModel,
    WorkerView,
)

pytestmark = pytest.mark.core

WEIGHTS, LIMIT = 1000, 3000
MODEL = ModelView(
    ModelSpec("m", "/m"),
    ModelFacts("m", parameters=500, checkpoint_dtype="bfloat16", kv_elements_per_token=5, context_length=64),
    started=True,
)
OLD = ResidentModel(ModelState.ACTIVE, running=1, weights_bytes=WEIGHTS, kv_quota_bytes=640, outdated=True)


def worker(name: str, gpu_id: int, *there: ResidentModel) -> WorkerView:
    reserved = sum(one.held_bytes for one in there)
    return WorkerView(name, name, "cuda", (gpu_id,), LIMIT, reserved, models={"m": there[0]} if there else {})


def planned(policy: str, *workers: WorkerView, view: ModelView = MODEL, parked: int = 1) -> list[str]:
    """The workers that it is brought up on while the old one is being released."""
    releases = tuple(
        InFlight(one.id, "m", CommandKind.RELEASE) for one in workers if one.models.get("m", None) is not None
    )
    demand = {"m": Demand(parked, 1.0)} if parked else {}
    snapshot = ClusterSnapshot(workers, {"m": view}, demand, releases)
    actions = policy_named(policy).plan(snapshot, 100.0).actions
    assert all(isinstance(action, Activate) for action in actions)
    return [action.worker for action in actions]


@pytest.mark.parametrize("policy", sorted(policies))
@pytest.mark.parametrize("state", [ModelState.ACTIVE, ModelState.DRAINING, ModelState.WAKING])
def test_requests_for_the_new_version_do_not_wait_for_the_end_of_the_old_one(
    policy: str, state: ModelState
) -> None:
    leaving = msgspec.structs.replace(OLD, state=state)
    assert planned(policy, worker("a", 0, leaving), worker("b", 1)) == ["b"]


@pytest.mark.parametrize("policy", sorted(policies))
def test_where_it_leaves_nothing_is_asked_meanwhile(policy: str) -> None:
    assert planned(policy, worker("a", 0, OLD)) == []


@pytest.mark.parametrize("policy", sorted(policies))
def test_one_of_the_registered_version_is_enough(policy: str) -> None:
    new = msgspec.structs.replace(OLD, outdated=False)
    snapshot = ClusterSnapshot(
        (worker("a", 0, new), worker("b", 1, OLD)),
        {"m": MODEL},
        {},
        (InFlight("b", "m", CommandKind.RELEASE),),
    )
    assert policy_named(policy).plan(snapshot, 100.0).actions == ()


def test_a_home_is_taken_again_only_when_the_old_one_has_left() -> None:
    spec = ModelSpec("m", "/m", pin=True, init_placements=[InitialPlacement([0])])
    pinned = msgspec.structs.replace(MODEL, spec=spec)
    for policy in sorted(policies):
        assert planned(policy, worker("a", 0, OLD), worker("b", 1), view=pinned, parked=0) == []
