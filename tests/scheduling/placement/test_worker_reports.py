"""What workers say that they can do and what they reserve bounds what is asked of them."""

from typing import Any

import msgspec
import pytest

from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.scheduling.placement.actions import Activate, Freeze
from prism.scheduling.placement.balanced import BalancedPlacement
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    ModelView,
    ResidentModel,
    WorkerView,
)

pytestmark = pytest.mark.core

WEIGHTS, FLOOR, FIXED = 1000, 64 * 10, 300
FACTS = ModelFacts(
    "", parameters=500, checkpoint_dtype="bfloat16", kv_elements_per_token=5, context_length=64
)


def small(name: str, tp_size: int = 1) -> ModelView:
    """A model of WEIGHTS bytes that keeps FLOOR bytes of KV cache when it is active."""
    return ModelView(ModelSpec(name, f"/{name}", tp_size=tp_size), msgspec.structs.replace(FACTS, model=name))


def worker(limit: int, **fields: Any) -> WorkerView:
    models = fields.pop("models", {})
    gpu_ids = fields.pop("gpu_ids", (0,))
    reserved = fields.pop("reserved", 0)
    return WorkerView("w", "n", "cuda", gpu_ids, limit, reserved, models=models, elastic=True, **fields)


def plan(there: WorkerView, *views: ModelView) -> list[Any]:
    """What is planned when the first of `views` has been asked for."""
    models = {one.spec.model_name: one for one in views}
    demand = {views[0].spec.model_name: Demand(1, 0.1)}
    return list(BalancedPlacement().plan(ClusterSnapshot((there,), models, demand), 100.0).actions)


def test_an_activation_takes_the_fixed_cost_that_the_worker_reserves_though_no_profile_is_known() -> None:
    takes = WEIGHTS + FLOOR + FIXED
    assert plan(worker(takes - 1, fixed_bytes=FIXED), small("a")) == []
    (action,) = plan(worker(takes, fixed_bytes=FIXED), small("a"))
    assert isinstance(action, Activate)
    assert (action.kv_bytes, action.footprint_bytes) == (FLOOR, takes)


def test_a_sleeping_engine_is_frozen_for_its_fixed_cost_though_no_profile_is_known() -> None:
    asleep = {"b": ResidentModel(ModelState.DOZING, idle_s=50.0, state_s=50.0)}
    there = worker(WEIGHTS + FLOOR + FIXED, fixed_bytes=FIXED, freezes=True, reserved=FIXED, models=asleep)
    (action,) = plan(there, small("a"), small("b"))
    assert isinstance(action, Freeze)
    assert action.model == "b"


def test_an_engine_is_not_asked_for_where_none_of_its_size_can_be() -> None:
    two = worker(10_000, gpu_ids=(0, 1), tp_sizes=(2,))
    assert plan(two, small("a")) == []
    assert [type(action) for action in plan(two, small("a", tp_size=2))] == [Activate]
    assert [type(action) for action in plan(worker(10_000, gpu_ids=(0, 1)), small("a"))] == [Activate]


def test_an_engine_of_several_ranks_wakes_with_the_quota_that_it_had() -> None:
    asleep = {"a": ResidentModel(ModelState.DOZING, active_bytes=5000)}
    there = worker(10_000, gpu_ids=(0, 1), models=asleep)
    found = small("a", tp_size=2)
    assert Board(ClusterSnapshot((there,), {"a": found}), 0.0).need(found, there) == 5000
