"""No sharing: who has a home keeps it, who has none stays out; with `shares_kv` KV cache is shared."""

import msgspec
import pytest
from tests.scheduling.placement.carrying_out import GB, Cluster
from tests.scheduling.placement.test_promises import view

from prism.common.messages.models import InitialPlacement
from prism.scheduling.placement import policy_named
from prism.scheduling.placement.actions import Activate
from prism.scheduling.placement.pricing import sizes_on
from prism.scheduling.placement.snapshot import Failure, ModelView
from prism.scheduling.placement.static import StaticPlacement

pytestmark = pytest.mark.core


def at(gpu: int, *, on: bool = True, kv_gb: float = 10.0) -> list[InitialPlacement]:
    return [InitialPlacement([gpu], on=on, max_memory_pool_size=kv_gb)]


def cluster(
    views: list[ModelView], policy: StaticPlacement, gpus: int = 1, *, elastic: bool = True
) -> Cluster:
    workers: dict[str, tuple[int, ...]] = {f"w{number}": (number,) for number in range(gpus)}
    return Cluster(policy, {v.spec.model_name: v for v in views}, workers, elastic=elastic)


def notes(it: Cluster) -> dict[str, str]:
    return {note.model: note.text for note in it.policy.plan(it.snapshot(), it.now).notes}


def test_every_model_comes_up_at_home_without_being_asked_for_and_stays() -> None:
    it = cluster(
        [view("a", 8, init_placements=at(1)), view("b", 8, init_placements=at(0))], StaticPlacement(), 2
    )
    it.settle()
    assert (it.active("a"), it.active("b")) == (["w1"], ["w0"])
    it.now += 3600.0
    assert it.step() == []


def test_who_has_no_home_gets_one_where_most_memory_is_left() -> None:
    it = cluster([view("a", 8, init_placements=at(0)), view("b", 8)], StaticPlacement(), 2)
    it.settle()
    assert it.active("b") == ["w1"]


def test_what_does_not_fit_stays_out_however_long_it_is_asked_for() -> None:
    it = cluster(
        [view("a", 30, init_placements=at(0)), view("b", 30, init_placements=at(0))], StaticPlacement()
    )
    it.settle()
    it.ask(["b"])
    it.now += 60.0
    assert it.step() == []
    assert (it.active("a"), it.active("b")) == (["w0"], [])
    assert "stays out: its home lacks" in notes(it)["b"]


def test_one_that_is_off_stays_off_and_says_so() -> None:
    it = cluster([view("a", 8, init_placements=at(0, on=False))], StaticPlacement())
    it.ask(["a"])
    assert it.step() == []
    assert notes(it)["a"].startswith("stays off")


@pytest.mark.parametrize(
    ("shares_kv", "elastic", "least"), [(False, True, False), (True, True, True), (True, False, False)]
)
def test_it_begins_with_all_its_kv_cache_or_where_quotas_move_with_the_least(
    shares_kv: bool, elastic: bool, least: bool
) -> None:
    it = cluster([view("a", 8, init_placements=at(0))], StaticPlacement(shares_kv), elastic=elastic)
    sizes = sizes_on(it.views["a"], it.snapshot().workers[0])
    (action,) = it.step()
    assert isinstance(action, Activate)
    assert sizes.kv_floor < sizes.kv_reservation <= 10 * GB
    assert action.kv_bytes == (sizes.kv_floor if least else sizes.kv_reservation)


def test_models_share_a_gpu_by_what_they_need_at_least() -> None:
    views = [view(name, 14, init_placements=at(0, kv_gb=20.0)) for name in "ab"]
    apart, together = cluster(views, StaticPlacement()), cluster(views, StaticPlacement(shares_kv=True))
    apart.settle()
    together.settle()
    assert [apart.active(name) for name in "ab"] == [["w0"], []]
    assert [together.active(name) for name in "ab"] == [["w0"], ["w0"]]


def test_one_whose_engine_died_comes_back_though_others_have_grown_into_its_memory() -> None:
    it = cluster([view(name, 8, init_placements=at(0)) for name in "ab"], StaticPlacement(shares_kv=True))
    it.settle()
    del it.held["w0", "b"]
    it.held["w0", "a"].kv = 60 * GB
    it.settle()
    assert it.active("b") == ["w0"]


def test_who_has_no_home_goes_where_it_did_not_just_fail_and_where_its_engines_can_be() -> None:
    it = cluster([view("a", 8)], StaticPlacement(), 3)
    snapshot = it.snapshot()
    u, v, w = snapshot.workers
    failed = Failure(v.id, "a", 1, it.now + 10.0, "out of memory")
    only = msgspec.structs.replace(
        snapshot,
        workers=(u, v, msgspec.structs.replace(w, tp_sizes=(2,), reserved_bytes=0)),
        failures=(failed,),
    )
    (action,) = it.policy.plan(only, it.now).actions
    assert action.worker == u.id


def test_it_is_made_by_name() -> None:
    assert policy_named("static", shares_kv=True, patience_s=1.0) == StaticPlacement(shares_kv=True)
