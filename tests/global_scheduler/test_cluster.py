"""What the scheduler makes of reports: ages, sums, losses, failures."""

import msgspec
import pytest

from prism.common.messages.load import DemandReport, LoadReport, ModelDemand, ModelLoad
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import CommandKind
from prism.global_scheduler.cluster import BREAK_S, GATEWAY_SILENT_S, WORKER_SILENT_S, ClusterState
from prism.scheduling.placement.snapshot import ClusterSnapshot, InFlight

pytestmark = pytest.mark.core

ACTIVE, DOZING, FAILED = ModelState.ACTIVE, ModelState.DOZING, ModelState.FAILED


def load(*models: ModelLoad, worker: str = "w", reserved: int = 0) -> LoadReport:
    return LoadReport(worker, "node", "cpu", [0], 100, reserved, list(models))


def seen(state: ClusterState, now: float) -> ClusterSnapshot:
    return state.snapshot((), now)


def test_times_in_reports_go_on_between_them() -> None:
    state = ClusterState()
    state.load(
        load(ModelLoad("a", ACTIVE, idle_s=5.0, state_s=9.0), ModelLoad("b", ACTIVE, running=1)), 100.0
    )
    state.demand(DemandReport("g", [ModelDemand("c", 1, 0.5)]), 100.0)
    later = seen(state, 100.25)
    assert (later.workers[0].models["a"].idle_s, later.workers[0].models["a"].state_s) == (5.25, 9.25)
    assert later.workers[0].models["b"].idle_s == 0.0
    assert later.demand["c"].oldest_parked_s == 0.75


def test_gpus_are_gone_since_a_worker_that_stays_last_had_them() -> None:
    state = ClusterState()
    state.load(load(worker="u"), 0.0)
    assert seen(state, 0.5).gone_gpus == {}
    state.load(msgspec.structs.replace(load(worker="u"), draining=True), 1.0)
    assert seen(state, 3.0).gone_gpus == {0: 3.0}
    state.forget_silent(9.0)
    assert seen(state, 9.0).gone_gpus == {0: 9.0}
    state.load(load(worker="v"), 10.0)
    assert seen(state, 10.0).gone_gpus == {}


def test_demand_of_all_gateways_adds_up_and_the_longest_wait_counts() -> None:
    state = ClusterState()
    state.demand(DemandReport("g1", [ModelDemand("a", 2, 0.5, 1.0)]), 0.0)
    state.demand(DemandReport("g2", [ModelDemand("a", 3, 1.5, 2.0)]), 0.0)
    total = seen(state, 0.0).demand["a"]
    assert (total.parked, total.oldest_parked_s, total.parked_for_s) == (5, 1.5, 1.5)
    state.demand(DemandReport("g2"), 0.1)
    assert seen(state, 0.0).demand["a"].parked == 2


def parked(state: ClusterState, oldest_s: float, now: float, requests: int = 1) -> None:
    state.demand(DemandReport("g", [ModelDemand("a", requests, oldest_s)] if requests else []), now)


def test_clients_that_give_up_and_ask_again_keep_their_models_place_in_the_queue() -> None:
    state = ClusterState()
    parked(state, 0.0, 100.0)
    parked(state, 30.0, 130.0)
    parked(state, 0.0, 131.0, requests=0)
    parked(state, 0.5, 130.0 + BREAK_S)
    after = seen(state, 131.0 + BREAK_S).demand["a"]
    assert (after.oldest_parked_s, after.parked_for_s) == (1.5, 31.0 + BREAK_S)
    assert after.waited_s == after.parked_for_s
    parked(state, 0.5, 132.0 + 2.5 * BREAK_S)
    assert seen(state, 132.0 + 2.5 * BREAK_S).demand["a"].waited_s == 0.5, "they were away for too long"


def test_a_model_that_came_up_has_been_waited_for_no_longer() -> None:
    state = ClusterState()
    parked(state, 0.0, 100.0)
    state.load(load(ModelLoad("a", ModelState.ACTIVE)), 130.0)
    state.load(load(ModelLoad("a", ModelState.DOZING)), 131.0)
    parked(state, 0.0, 132.0)
    assert seen(state, 133.0).demand["a"].parked_for_s == 1.0


def test_the_silent_are_forgotten() -> None:
    state = ClusterState()
    state.load(load(worker="old"), 0.0)
    state.backoff.failed("old", "a", "boom", 0.0)
    state.load(load(worker="new"), 2.0)
    state.demand(DemandReport("g", [ModelDemand("a", 1)]), 0.0)
    assert state.forget_silent(WORKER_SILENT_S) == []
    assert state.forget_silent(WORKER_SILENT_S + 0.1) == ["old"]
    after = seen(state, 3.0)
    assert [worker.id for worker in after.workers] == ["new"]
    assert after.failures == ()
    assert "a" in after.demand
    state.forget_silent(GATEWAY_SILENT_S + 0.1)
    assert seen(state, 4.0).demand == {}


@pytest.mark.parametrize(
    ("second", "matters"),
    [
        (load(ModelLoad("a", ACTIVE, running=2, idle_s=0.2, generated_tokens=9)), False),
        (load(ModelLoad("a", ACTIVE)), True),
        (load(ModelLoad("a", DOZING, running=1)), True),
        (load(ModelLoad("a", ACTIVE, running=1), reserved=5), True),
    ],
)
def test_only_news_is_worth_a_plan(second: LoadReport, matters: bool) -> None:
    state = ClusterState()
    assert state.load(load(ModelLoad("a", ACTIVE, running=1)), 0.0)
    assert state.load(second, 0.1) is matters


def test_a_model_counts_as_started_while_the_worker_that_ran_it_is_there() -> None:
    state = ClusterState()
    state.set_spec("spec.a", ModelSpec("a", "/a"))
    state.load(load(ModelLoad("a", ModelState.STARTING)), 0.0)
    assert not seen(state, 0.0).models["a"].started
    state.load(load(ModelLoad("a", ACTIVE)), 1.0)
    state.load(load(), 2.0)
    assert seen(state, 2.0).models["a"].started
    state.forget_silent(99.0)
    assert not seen(state, 99.0).models["a"].started


def test_what_an_active_model_held_is_remembered_while_it_dozes() -> None:
    state = ClusterState()
    state.load(load(ModelLoad("a", ACTIVE, weights_bytes=30, kv_quota_bytes=12)), 0.0)
    state.load(load(ModelLoad("a", DOZING)), 1.0)
    assert seen(state, 1.0).workers[0].models["a"].active_bytes == 42


def test_what_a_worker_can_do_is_taken_from_its_reports() -> None:
    told = msgspec.structs.replace(
        load(
            ModelLoad("a", ACTIVE, kv_quota_bytes=60, kv_used_bytes=50, kv_spare_bytes=45,
                      kv_wanted_bytes=30, prefill_tokens_per_s=900.0, decode_step_s=0.01, gpu_ids=[1]),
            reserved=70,
        ),
        gpu_ids=[0, 1],
        memory_reserved_by_gpu=[70, 20],
        profile="h200",
        elastic=True,
        freezes=True,
        fixed_bytes=7,
        tp_sizes=[1, 2],
    )  # fmt: skip
    state = ClusterState()
    state.load(told, 0.0)
    worker = seen(state, 0.0).workers[0]
    assert worker.profile is not None
    assert worker.profile.name == "h200"
    assert (worker.elastic, worker.freezes, worker.tp_sizes) == (True, True, (1, 2))
    assert worker.context_bytes == 7, "what the worker reserves, not what its profile says"
    assert worker.reserved_by_gpu == {0: 70, 1: 20}
    model = worker.models["a"]
    assert (model.gpu_ids, model.kv_wanted_bytes) == ((1,), 30)
    assert (model.prefill_tokens_per_s, model.decode_step_s) == (900.0, 0.01)
    assert model.kv_quota_bytes - model.kv_used_bytes == 45, "as much as the worker would take from it"


def test_a_profile_that_nobody_knows_is_none() -> None:
    state = ClusterState()
    state.load(msgspec.structs.replace(load(), profile="abacus"), 0.0)
    assert seen(state, 0.0).workers[0].profile is None


def test_an_active_model_that_fails_by_itself_backs_off_until_it_has_lasted() -> None:
    state = ClusterState()
    for _ in range(2):
        state.load(load(ModelLoad("a", ACTIVE)), 0.0)
        state.load(load(ModelLoad("a", FAILED, failure="killed by signal 9")), 1.0)
        state.load(load(ModelLoad("a", FAILED, failure="killed by signal 9")), 1.2)
    failure = seen(state, 1.0).failures[0]
    assert (failure.count, failure.retry_at, failure.reason) == (2, 3.0, "killed by signal 9")
    state.load(load(ModelLoad("a", ACTIVE, state_s=10.0)), 9.0)
    assert seen(state, 9.0).failures
    state.load(load(ModelLoad("a", ACTIVE, state_s=60.0)), 60.0)
    assert not seen(state, 60.0).failures


def test_a_removed_model_is_remembered_until_no_worker_holds_it() -> None:
    state = ClusterState()
    state.set_spec("spec.a", ModelSpec("a", "/a"))
    state.set_facts("facts.a", ModelFacts("a"))
    state.load(load(ModelLoad("a", ACTIVE)), 0.0)
    state.set_spec("spec.a", None)
    assert seen(state, 0.0).models["a"].removed
    state.load(load(), 1.0)
    assert seen(state, 1.0).models == {}
    state.set_spec("spec.a", ModelSpec("a", "/a"))
    assert not seen(state, 1.0).models["a"].removed


def outdated(state: ClusterState) -> list[tuple[str, str]]:
    return [(worker, spec.model_name) for worker, spec, _ in state.outdated()]


@pytest.mark.parametrize("resident", [ACTIVE, DOZING, ModelState.FROZEN])
def test_an_engine_of_another_version_than_is_registered_is_outdated(resident: ModelState) -> None:
    state = ClusterState()
    state.set_spec("spec.a", ModelSpec("a", "/a"))
    state.load(load(ModelLoad("a", resident, version="1")), 0.0)
    assert outdated(state) == [], "nothing is known of its files"
    state.set_facts("facts.a", ModelFacts("a", version="1"))
    assert outdated(state) == []
    state.set_facts("facts.a", ModelFacts("a", version="2"))
    assert outdated(state) == [("w", "a")]
    state.load(load(ModelLoad("a", ModelState.DRAINING, version="1")), 0.0)
    assert outdated(state) == [], "it leaves already"
    state.load(load(ModelLoad("a", ModelState.COLD)), 0.0)
    assert outdated(state) == []


def test_who_names_no_version_is_never_outdated() -> None:
    state = ClusterState()
    state.set_spec("spec.a", ModelSpec("a", "/a"))
    state.set_facts("facts.a", ModelFacts("a", version="2"))
    state.load(load(ModelLoad("a", ACTIVE)), 0.0)
    assert outdated(state) == []
    state.load(load(ModelLoad("a", ACTIVE, version="1")), 0.0)
    state.set_facts("facts.a", ModelFacts("a", error="its folder is gone"))
    assert outdated(state) == [], "what is there goes on serving"


def test_an_outdated_engine_is_shown_to_policies_as_such() -> None:
    state = ClusterState()
    state.set_facts("facts.a", ModelFacts("a", version="2"))
    state.load(
        load(ModelLoad("a", ModelState.DRAINING, version="1"), ModelLoad("b", ACTIVE, version="1")), 0.0
    )
    there = seen(state, 0.0).workers[0]
    assert there.outdated == ["a"]


@pytest.mark.parametrize("between", [[], [ModelFacts("a", error="half of its files are there")]])
def test_what_another_version_took_and_where_it_ran_or_failed_says_nothing_of_the_new_one(
    between: list[ModelFacts],
) -> None:
    state = ClusterState()
    state.set_spec("spec.a", ModelSpec("a", "/a"))
    state.set_facts("facts.a", ModelFacts("a", version="1"))
    old = ModelLoad("a", ACTIVE, weights_bytes=70, version="1")
    state.load(load(old), 0.0)
    state.backoff.failed("w", "a", "no", 0.0)
    before = seen(state, 0.0)
    assert (before.workers[0].models["a"].active_bytes, before.models["a"].started) == (70, True)
    for facts in [*between, ModelFacts("a", version="2")]:
        state.set_facts("facts.a", facts)
    state.load(load(old), 1.0)
    state.load(load(ModelLoad("a", ModelState.COLD)), 2.0)
    after = seen(state, 2.0)
    assert (after.workers[0].models["a"].active_bytes, after.models["a"].started) == (0, False)
    assert after.failures == ()


@pytest.mark.parametrize("state", [ModelState.DRAINING, ModelState.STARTING, ACTIVE])
def test_an_outdated_engine_keeps_the_new_version_from_its_worker_though_nobody_here_released_it(
    state: ModelState,
) -> None:
    cluster = ClusterState()
    cluster.set_facts("facts.a", ModelFacts("a", version="2"))
    cluster.load(load(ModelLoad("a", state, version="1"), ModelLoad("b", state, version="1")), 0.0)
    release = InFlight("w", "a", CommandKind.RELEASE)
    assert seen(cluster, 0.0).in_flight == (release,)
    starting = InFlight("w", "a", CommandKind.ACTIVATE)
    assert cluster.snapshot((starting,), 0.0).in_flight == (starting,)


def test_an_old_engine_that_dies_is_no_failure_of_the_new_version() -> None:
    state = ClusterState()
    state.load(load(ModelLoad("a", ACTIVE, version="1")), 0.0)
    state.set_facts("facts.a", ModelFacts("a", version="2"))
    state.load(load(ModelLoad("a", FAILED, failure="it fell")), 1.0)
    assert seen(state, 1.0).failures == ()
