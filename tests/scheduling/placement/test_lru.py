"""The LRU policy, case by case. Sizes are small: a model of size 30 holds 20 bytes of weights, 10 of KV."""

from typing import Any

import msgspec
import pytest

from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec, ModelState, Tier
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement import policies
from prism.scheduling.placement.actions import Activate, Doze, Plan, Release
from prism.scheduling.placement.lru import LruPlacement
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    Failure,
    InFlight,
    ModelView,
    ResidentModel,
    WorkerView,
)

pytestmark = pytest.mark.core

KV = 10
NOW = 1000.0


def model(
    name: str, size: int = 30, *, started: bool = True, removed: bool = False, **spec: Any
) -> ModelView:
    facts = ModelFacts(name, parameters=size - KV, kv_elements_per_token=1, context_length=KV // 2)
    return ModelView(ModelSpec(name, f"/{name}", **spec), facts, started, removed)


def active(size: int = 30, **fields: Any) -> ResidentModel:
    fields = {"idle_s": 100.0, "state_s": 100.0, **fields}
    return ResidentModel(ModelState.ACTIVE, weights_bytes=size - KV, kv_quota_bytes=KV, **fields)


def busy(size: int = 30, **fields: Any) -> ResidentModel:
    return active(size, running=1, idle_s=0.0, **fields)


def dozing(**fields: Any) -> ResidentModel:
    return ResidentModel(ModelState.DOZING, **fields)


def worker(
    id: str = "w", limit: int = 100, gpu_ids: tuple[int, ...] = (0,), **models: ResidentModel
) -> WorkerView:
    reserved = sum(resident.held_bytes for resident in models.values())
    return WorkerView(id, "node", "cpu", gpu_ids, limit, reserved, element_bytes=1, models=models)


def cluster(workers: list[WorkerView], models: list[ModelView], **rest: Any) -> ClusterSnapshot:
    return ClusterSnapshot(tuple(workers), {view.spec.model_name: view for view in models}, **rest)


def parked(seconds: float = 0.1, requests: int = 1) -> Demand:
    return Demand(requests, seconds)


def plan(snapshot: ClusterSnapshot) -> Plan:
    return LruPlacement().plan(snapshot, NOW)


def told(snapshot: ClusterSnapshot) -> list[tuple[str, str, str]]:
    return [(type(action).__name__, action.model, action.worker) for action in plan(snapshot).actions]


def on(*gpu_ids: int, **fields: Any) -> list[InitialPlacement]:
    return [InitialPlacement(list(gpu_ids), **fields)]


class TestDemand:
    def test_a_worker_that_still_starts_comes_after_one_that_is_ready(self) -> None:
        starting = msgspec.structs.replace(worker("a", limit=1000), ready=False)
        ready = worker("b", limit=100)
        snapshot = cluster([starting, ready], [model("m")], demand={"m": parked()})
        assert told(snapshot) == [("Activate", "m", "b")]
        assert told(cluster([starting], [model("m")], demand={"m": parked()})) == [("Activate", "m", "a")]

    def test_a_model_in_demand_is_activated_with_its_quota(self) -> None:
        snapshot = cluster([worker()], [model("a")], demand={"a": parked(requests=200)})
        assert plan(snapshot).actions == (Activate("a", "w", KV, 30, "200 requests parked"),)

    def test_nothing_is_done_without_demand(self) -> None:
        snapshot = cluster([worker(a=active())], [model("a"), model("b")])
        assert plan(snapshot) == Plan()

    def test_a_report_of_arrivals_alone_is_no_demand(self) -> None:
        assert told(cluster([worker()], [model("a")], demand={"a": Demand(0, 0.0, 5.0)})) == []

    @pytest.mark.parametrize(
        "state",
        [ModelState.ACTIVE, ModelState.STAGING, ModelState.STARTING, ModelState.WAKING, ModelState.DRAINING],
    )
    def test_a_model_that_is_up_or_on_its_way_is_left_alone(self, state: ModelState) -> None:
        there = worker(a=ResidentModel(state))
        assert told(cluster([there, worker("v")], [model("a")], demand={"a": parked()})) == []

    def test_a_command_in_flight_is_waited_for(self) -> None:
        flying = (InFlight("w", "a", CommandKind.ACTIVATE, 30),)
        assert (
            told(cluster([worker(), worker("v")], [model("a")], demand={"a": parked()}, in_flight=flying))
            == []
        )

    def test_demand_for_an_unknown_model_is_nothing_to_act_on(self) -> None:
        assert told(cluster([worker()], [], demand={"ghost": parked()})) == []

    def test_the_longest_waiting_is_served_first_when_memory_is_short(self) -> None:
        demand = {"a": parked(0.1), "b": parked(0.5)}
        assert told(cluster([worker(limit=40)], [model("a"), model("b")], demand=demand)) == [
            ("Activate", "b", "w")
        ]


class TestWhichWorker:
    def test_where_it_dozes_rather_than_where_more_is_free(self) -> None:
        workers = [worker("small", 60, a=dozing()), worker("large", 100)]
        assert told(cluster(workers, [model("a")], demand={"a": parked()})) == [("Activate", "a", "small")]

    def test_else_where_most_is_free(self) -> None:
        workers = [worker("full", 100, b=active(60)), worker("free", 90)]
        assert told(cluster(workers, [model("a"), model("b")], demand={"a": parked()})) == [
            ("Activate", "a", "free")
        ]

    def test_free_memory_elsewhere_rather_than_putting_another_to_sleep(self) -> None:
        workers = [worker("dozes", 60, a=dozing(), b=active(60)), worker("free", 60)]
        assert told(cluster(workers, [model("a"), model("b", 60)], demand={"a": parked()})) == [
            ("Activate", "a", "free")
        ]

    def test_never_one_that_drains(self) -> None:
        leaving = msgspec.structs.replace(worker("leaving", 100), draining=True)
        snapshot = cluster([leaving], [model("a")], demand={"a": parked()})
        assert told(snapshot) == []
        assert "waits for a worker" in plan(snapshot).notes[0].text
        staying = cluster([leaving, worker("stays", 30)], [model("a")], demand={"a": parked()})
        assert told(staying) == [("Activate", "a", "stays")]

    def test_a_model_active_only_where_it_drains_is_brought_up_elsewhere(self) -> None:
        leaving = msgspec.structs.replace(worker("leaving", a=busy()), draining=True)
        snapshot = cluster([leaving, worker("w")], [model("a")], demand={"a": parked()})
        assert told(snapshot) == [("Activate", "a", "w")]

    def test_one_with_enough_gpus_for_tensor_parallelism(self) -> None:
        workers = [worker("one"), worker("two", gpu_ids=(1, 2))]
        assert told(cluster(workers, [model("a", tp_size=2)], demand={"a": parked()})) == [
            ("Activate", "a", "two")
        ]

    def test_demand_goes_anywhere_even_if_the_named_gpus_are_missing(self) -> None:
        snapshot = cluster([worker()], [model("a", init_placements=on(7))], demand={"a": parked()})
        assert told(snapshot) == [("Activate", "a", "w")]

    def test_memory_that_an_activation_in_flight_will_take_is_not_free(self) -> None:
        flying = (InFlight("w", "b", CommandKind.ACTIVATE, 60),)
        models = [model("a", 50), model("b", 60)]
        assert told(cluster([worker()], models, demand={"a": parked()}, in_flight=flying)) == []
        starting = ResidentModel(ModelState.STARTING, weights_bytes=50, kv_quota_bytes=10)
        reserved = cluster([worker(limit=110, b=starting)], models, demand={"a": parked()}, in_flight=flying)
        assert told(reserved) == [("Activate", "a", "w")], "what it holds already must not be counted twice"

    def test_what_a_dozing_model_held_when_it_was_active_counts_more_than_the_estimate(self) -> None:
        there = worker(limit=35, a=dozing(active_bytes=36))
        assert told(cluster([there], [model("a")], demand={"a": parked()})) == []
        assert told(
            cluster([worker(limit=36, a=dozing(active_bytes=36))], [model("a")], demand={"a": parked()})
        )

    def test_where_quotas_move_what_it_had_does_not_count(self) -> None:
        there = msgspec.structs.replace(worker(limit=35, a=dozing(active_bytes=36)), elastic=True)
        assert told(cluster([there], [model("a")], demand={"a": parked()}))

    def test_the_fixed_cost_of_an_engine_counts_where_it_has_none(self) -> None:
        nowhere: dict[str, Any] = {}
        for limit, resident, expected in ((34, nowhere, 0), (35, nowhere, 1), (35, {"a": dozing()}, 1)):
            there = worker(limit=limit, **resident)
            there = msgspec.structs.replace(there, fixed_bytes=5, reserved_bytes=5 if resident else 0)
            found = told(cluster([there], [model("a", 30)], demand={"a": parked()}))
            assert len(found) == expected, (limit, resident)


class TestMakingRoom:
    def test_the_least_recently_used_sleeps_first_and_no_more_than_needed(self) -> None:
        there = worker(a=active(idle_s=5), b=active(idle_s=9), c=active(idle_s=7))
        models = [model(name) for name in "abcd"]
        assert told(cluster([there], models, demand={"d": parked()})) == [("Doze", "b", "w")]
        larger = [*models[:3], model("d", 60)]
        assert told(cluster([there], larger, demand={"d": parked()})) == [
            ("Doze", "b", "w"),
            ("Doze", "c", "w"),
        ]

    def test_activation_waits_until_the_memory_is_free(self) -> None:
        draining = ResidentModel(ModelState.DRAINING, weights_bytes=50, kv_quota_bytes=10)
        models = [model("a", 60), model("b", 50)]
        demand = {"b": parked()}
        assert told(cluster([worker(a=draining)], models, demand=demand)) == []
        flying = (InFlight("w", "a", CommandKind.DOZE),)
        assert told(cluster([worker(a=active(60))], models, demand=demand, in_flight=flying)) == []
        assert told(cluster([worker(a=dozing())], models, demand=demand)) == [("Activate", "b", "w")]

    def test_lower_priority_sleeps_before_longer_idle(self) -> None:
        there = worker(limit=60, a=active(idle_s=900), b=active(idle_s=1))
        models = [model("a", priority=1), model("b"), model("c")]
        assert told(cluster([there], models, demand={"c": parked()})) == [("Doze", "b", "w")]

    @pytest.mark.parametrize("spec", [{"pin": True}, {"minimum_tier": Tier.ACTIVE}])
    def test_pinned_models_and_those_that_must_stay_active_never_sleep(self, spec: dict[str, Any]) -> None:
        there = worker(limit=40, a=active(idle_s=900))
        snapshot = cluster([there], [model("a", **spec), model("b")], demand={"b": parked(900)})
        assert told(snapshot) == []
        assert "pinned" in plan(snapshot).notes[0].text

    @pytest.mark.parametrize("tier", [Tier.DOZING, Tier.STAGED, Tier.COLD])
    def test_other_minimum_tiers_allow_to_doze(self, tier: Tier) -> None:
        there = worker(limit=40, a=active())
        models = [model("a", minimum_tier=tier), model("b")]
        assert told(cluster([there], models, demand={"b": parked()})) == [("Doze", "a", "w")]

    def test_none_sleeps_that_requests_have_waited_longer_for(self) -> None:
        there = worker(limit=40, a=active())
        models = [model("a"), model("b")]
        assert told(cluster([there], models, demand={"a": parked(0.5), "b": parked(0.4)})) == []
        assert told(cluster([there], models, demand={"a": parked(0.3), "b": parked(0.4)})) == [
            ("Doze", "a", "w")
        ]

    def test_a_model_that_came_up_a_moment_ago_is_not_idle_yet(self) -> None:
        models = [model("a"), model("b")]
        fresh = worker(limit=40, a=active(idle_s=0.1, state_s=0.1))
        assert told(cluster([fresh], models, demand={"b": parked()})) == []
        settled = worker(limit=40, a=active(idle_s=0.6, state_s=0.6))
        assert told(cluster([settled], models, demand={"b": parked()})) == [("Doze", "a", "w")]

    def test_nobody_sleeps_where_it_would_not_be_enough(self) -> None:
        there = worker(limit=100, a=active(30), b=busy(60))
        assert (
            told(cluster([there], [model("a"), model("b", 60), model("c", 50)], demand={"c": parked()})) == []
        )

    def test_memory_freed_for_one_is_not_given_to_another(self) -> None:
        draining = ResidentModel(ModelState.DRAINING, weights_bytes=50, kv_quota_bytes=10)
        there = worker(limit=100, a=draining)
        models = [model("a", 60), model("b", 90), model("c", 30)]
        demand = {"b": parked(1.0), "c": parked(0.5)}
        assert told(cluster([there], models, demand=demand)) == []
        assert told(cluster([there, worker("v", 30)], models, demand=demand)) == [("Activate", "c", "v")]


class TestBusyModels:
    def test_they_stay_while_the_wait_is_short(self) -> None:
        snapshot = cluster([worker(limit=40, a=busy())], [model("a"), model("b")], demand={"b": parked(1.9)})
        assert told(snapshot) == []
        assert "waits for memory" in plan(snapshot).notes[0].text

    def test_after_patience_the_longest_active_one_drains(self) -> None:
        there = worker(limit=70, a=busy(state_s=10), b=busy(state_s=20))
        actions = plan(cluster([there], [model(n) for n in "abc"], demand={"c": parked(2.1)})).actions
        assert actions == (Doze("b", "w", 60.0, "memory for c: 1 requests parked"),)

    def test_idle_ones_go_first_even_then(self) -> None:
        there = worker(limit=70, a=busy(state_s=10), b=active(idle_s=1))
        models = [model("a"), model("b"), model("c", 60)]
        assert told(cluster([there], models, demand={"c": parked(3)})) == [
            ("Doze", "b", "w"),
            ("Doze", "a", "w"),
        ]

    def test_one_that_became_active_a_moment_ago_stays_but_its_memory_is_spoken_for(self) -> None:
        there = worker(limit=60, a=busy(state_s=4))
        models = [model("a"), model("b", 50), model("c", 30)]
        demand = {"b": parked(3.0), "c": parked(2.5)}
        assert told(cluster([there], models, demand=demand)) == [], "c fits, but b has waited longer"
        ripe = worker(limit=60, a=busy(state_s=5))
        assert told(cluster([ripe], models, demand=demand)) == [("Doze", "a", "w")]


class TestInitialPlacement:
    def test_models_that_are_on_start_in_their_order_on_their_gpus(self) -> None:
        models = [model(n, started=False, init_placements=on(i)) for n, i in (("z", 1), ("a", 0))]
        workers = [worker("w0", gpu_ids=(0,)), worker("w1", gpu_ids=(1,))]
        assert told(cluster(workers, models)) == [("Activate", "z", "w1"), ("Activate", "a", "w0")]

    def test_models_that_are_off_wait_for_requests(self) -> None:
        assert told(cluster([worker()], [model("a", started=False, init_placements=on(0, on=False))])) == []
        assert told(cluster([worker()], [model("a", started=False)])) == []

    def test_they_make_nobody_sleep(self) -> None:
        models = [model("a"), model("b", started=False, init_placements=on(0))]
        snapshot = cluster([worker(limit=40, a=active())], models)
        assert told(snapshot) == []
        assert "waits for free memory (initial placement)" in plan(snapshot).notes[0].text

    def test_it_happens_once(self) -> None:
        there = worker(a=dozing())
        assert told(cluster([there], [model("a", init_placements=on(0))])) == []

    def test_missing_gpus_are_waited_for_and_named(self) -> None:
        snapshot = cluster([worker()], [model("a", started=False, init_placements=on(3))])
        assert told(snapshot) == []
        assert "[3]" in plan(snapshot).notes[0].text

    def test_demand_comes_before_it(self) -> None:
        models = [model("a", started=False, init_placements=on(0)), model("b")]
        assert told(cluster([worker(limit=40)], models, demand={"b": parked()})) == [("Activate", "b", "w")]

    def test_a_pinned_model_comes_up_unasked_at_home_and_may_make_idle_ones_sleep(self) -> None:
        models = [model("a", pin=True, init_placements=on(0, on=False)), model("b")]
        workers = [worker("home", 40, b=active()), worker("v", gpu_ids=(1,))]
        assert told(cluster(workers, models)) == [("Doze", "b", "home")]
        assert told(cluster([worker("home", 40, b=busy())], models)) == []

    def test_requests_that_wait_take_a_pinned_model_nowhere_else(self) -> None:
        models = [model("a", pin=True, init_placements=on(0)), model("b")]
        home, roomier = worker("home", 40, gpu_ids=(0,)), worker("v", 1000, gpu_ids=(1,))
        demand = {"a": parked()}
        assert told(cluster([home, roomier], models, demand=demand)) == [("Activate", "a", "home")]
        taken = worker("home", 40, gpu_ids=(0,), b=active())
        assert told(cluster([taken, roomier], models, demand=demand)) == [("Doze", "b", "home")]

    def test_unless_no_worker_has_its_gpus_or_it_failed_on_all_that_do(self) -> None:
        models = [model("a", pin=True, init_placements=on(0))]
        home, other = worker("home", gpu_ids=(0,)), worker("v", gpu_ids=(1,))
        assert told(cluster([other], models, demand={"a": parked()})) == [("Activate", "a", "v")]
        failures = (Failure("home", "a", 1, NOW + 5.0),)
        snapshot = cluster([home, other], models, demand={"a": parked()}, failures=failures)
        assert told(snapshot) == [("Activate", "a", "v")]
        assert told(cluster([home, other], models, failures=failures)) == [], "nobody waits for it"


class TestWhatCannotBe:
    def test_a_model_larger_than_every_worker_is_told_with_both_sizes(self) -> None:
        there = worker(limit=40_000_000, b=active())
        snapshot = cluster([there], [model("a", 50_000_000), model("b")], demand={"a": parked(99)})
        assert told(snapshot) == []
        assert "0.050 GB" in plan(snapshot).notes[0].text
        assert "0.040 GB" in plan(snapshot).notes[0].text

    def test_a_model_whose_folder_is_not_read_or_not_readable_waits(self) -> None:
        unread = ModelView(ModelSpec("a", "/a"))
        broken = ModelView(ModelSpec("b", "/b"), ModelFacts("b", error="no config.json in /b"))
        snapshot = cluster([worker()], [unread, broken], demand={"a": parked(), "b": parked()})
        assert told(snapshot) == []
        assert [note.model for note in plan(snapshot).notes] == ["a", "b"]
        assert "no config.json" in plan(snapshot).notes[1].text

    def test_without_a_worker_there_is_a_note(self) -> None:
        assert "waits for a worker" in plan(cluster([], [model("a")], demand={"a": parked()})).notes[0].text

    def test_notes_do_not_change_while_time_passes(self) -> None:
        def at(seconds: float) -> ClusterSnapshot:
            return cluster(
                [worker(limit=40, a=busy(state_s=seconds))],
                [model("a"), model("b")],
                demand={"b": parked(seconds)},
            )

        assert plan(at(0.1)).notes == plan(at(1.7)).notes != ()


class TestFailures:
    def failed(self, retry_at: float) -> tuple[Failure, ...]:
        return (Failure("w", "a", 3, retry_at, "boom"),)

    def test_a_failed_activation_is_not_tried_there_before_its_time(self) -> None:
        before = cluster([worker()], [model("a")], demand={"a": parked()}, failures=self.failed(NOW + 1))
        assert told(before) == []
        assert "boom" in plan(before).notes[0].text
        after = cluster([worker()], [model("a")], demand={"a": parked()}, failures=self.failed(NOW))
        assert told(after) == [("Activate", "a", "w")]

    def test_but_elsewhere(self) -> None:
        workers = [worker("w"), worker("v", 50)]
        snapshot = cluster(workers, [model("a")], demand={"a": parked()}, failures=self.failed(NOW + 9))
        assert told(snapshot) == [("Activate", "a", "v")]

    def test_a_failure_that_only_the_worker_remembers_counts_as_the_first(self) -> None:
        def at(seconds: float) -> ClusterSnapshot:
            there = worker(a=ResidentModel(ModelState.FAILED, state_s=seconds))
            return cluster([there], [model("a")], demand={"a": parked()})

        assert told(at(0.5)) == []
        assert told(at(1.0)) == [("Activate", "a", "w")]

    def test_a_doze_that_failed_is_not_repeated_at_once(self) -> None:
        there = worker(limit=70, a=active(idle_s=9), b=active(idle_s=5))
        models = [model("a"), model("b"), model("c")]
        snapshot = cluster([there], models, demand={"c": parked()}, failures=self.failed(NOW + 1))
        assert told(snapshot) == [("Doze", "b", "w")]


class TestIdleness:
    def test_a_model_past_its_idle_time_out_sleeps(self) -> None:
        there = worker(a=active(idle_s=31), b=active(idle_s=29), c=active(idle_s=99))
        models = [model("a", idle_timeout_s=30), model("b", idle_timeout_s=30), model("c")]
        assert told(cluster([there], models)) == [("Doze", "a", "w")]

    @pytest.mark.parametrize(
        ("spec", "resident"),
        [
            ({"pin": True}, active(idle_s=99)),
            ({"minimum_tier": Tier.ACTIVE}, active(idle_s=99)),
            ({}, busy()),
            ({}, dozing(idle_s=99)),
        ],
    )
    def test_unless_it_may_not_or_is_not_idle(self, spec: dict[str, Any], resident: ResidentModel) -> None:
        models = [model("a", idle_timeout_s=30, **spec)]
        assert told(cluster([worker(a=resident)], models)) == []


def test_a_removed_model_is_released_wherever_it_is() -> None:
    workers = [
        worker("w", a=active()),
        worker("v", a=dozing()),
        worker("x", a=ResidentModel(ModelState.STAGED)),
    ]
    actions = plan(cluster(workers, [model("a", removed=True)], demand={"a": parked()})).actions
    assert [(type(action), action.worker) for action in actions] == [(Release, "w"), (Release, "v")]


class TestReplicas:
    def test_they_come_once_the_first_is_active_each_on_a_worker_of_its_own(self) -> None:
        models = [model("a", replicas=3)]
        several = [worker("u"), worker("v"), worker("w")]
        assert told(cluster(several, models, demand={"a": parked()})) == [("Activate", "a", "u")]
        starting = worker("u", a=ResidentModel(ModelState.STARTING, weights_bytes=20, kv_quota_bytes=10))
        assert told(cluster([starting, *several[1:]], models)) == []
        serving = [worker("u", a=active()), *several[1:]]
        assert told(cluster(serving, models)) == [("Activate", "a", "v"), ("Activate", "a", "w")]

    def test_one_on_its_way_counts(self) -> None:
        there = [worker("u", a=active()), worker("v")]
        flying = (InFlight("v", "a", CommandKind.ACTIVATE, 30),)
        assert told(cluster(there, [model("a", replicas=2)], in_flight=flying)) == []

    def test_a_sleeping_one_wakes_rather_than_another_starts(self) -> None:
        there = [worker("u", a=active()), worker("v", limit=500), worker("w", a=dozing())]
        assert told(cluster(there, [model("a", replicas=2)])) == [("Activate", "a", "w")]

    def test_they_put_nobody_to_sleep_and_that_is_told(self) -> None:
        there = [worker("u", a=active()), worker("v", limit=40, b=active())]
        snapshot = cluster(there, [model("a", replicas=2), model("b")])
        assert told(snapshot) == []
        assert plan(snapshot).notes[0].text == "waits for free memory (2 replicas asked for)"

    def test_more_than_there_are_workers_is_told(self) -> None:
        snapshot = cluster([worker("u", a=active())], [model("a", replicas=1_000_000)])
        assert told(snapshot) == []
        assert "waits for a further worker (1000000 replicas asked for)" in plan(snapshot).notes[0].text

    def test_memory_goes_first_to_models_that_requests_wait_for(self) -> None:
        there = [worker("u", limit=30, a=active()), worker("v", limit=40)]
        snapshot = cluster(there, [model("a", replicas=2), model("b")], demand={"b": parked()})
        assert told(snapshot) == [("Activate", "b", "v")]

    def test_one_that_a_draining_worker_takes_along_is_replaced(self) -> None:
        leaving = msgspec.structs.replace(worker("u", a=active()), draining=True)
        there = [leaving, worker("v", a=active()), worker("w")]
        assert told(cluster(there, [model("a", replicas=2)])) == [("Activate", "a", "w")]

    def test_all_that_are_idle_for_too_long_sleep_together_or_none(self) -> None:
        models = [model("a", replicas=2, idle_timeout_s=30)]
        one_busy = [worker("u", a=active(idle_s=31)), worker("v", a=busy())]
        assert told(cluster(one_busy, models)) == []
        all_idle = [worker("u", a=active(idle_s=31)), worker("v", a=active(idle_s=40))]
        assert told(cluster(all_idle, models)) == [("Doze", "a", "u"), ("Doze", "a", "v")]

    def test_none_is_added_to_a_model_that_sleeps_or_is_gone(self) -> None:
        there = [worker("u", a=dozing(), b=active()), worker("v")]
        models = [model("a", replicas=2), model("b", replicas=2, removed=True)]
        assert told(cluster(there, models)) == [("Release", "b", "u")]


class TestHomesThatAreGone:
    @pytest.mark.parametrize("spec", [{"pin": True}, {}])
    def test_a_model_whose_gpus_are_gone_goes_elsewhere_after_a_while(self, spec: dict[str, Any]) -> None:
        def after(seconds: float) -> ClusterSnapshot:
            homeless = model("a", started=False, init_placements=on(1), **spec)
            return cluster([worker("u")], [homeless], gone_gpus={1: seconds})

        assert told(after(14.0)) == []
        assert "GPU ids [1]" in plan(after(14.0)).notes[0].text
        assert told(after(16.0)) == [("Activate", "a", "u")]
        assert "its GPU ids [1] are gone" in plan(after(16.0)).actions[0].reason

    def test_but_puts_nobody_to_sleep_there(self) -> None:
        snapshot = cluster(
            [worker("u", limit=40, b=active())],
            [model("a", pin=True, init_placements=on(1)), model("b")],
            gone_gpus={1: 99.0},
        )
        assert told(snapshot) == []
        assert "waits for free memory" in plan(snapshot).notes[0].text

    def test_gpus_that_never_were_there_are_waited_for(self) -> None:
        snapshot = cluster([worker("u")], [model("a", pin=True, init_placements=on(7))], gone_gpus={1: 99.0})
        assert told(snapshot) == []
        assert "GPU ids [7]" in plan(snapshot).notes[0].text

    def test_it_stays_where_it_is_when_they_are_back(self) -> None:
        there = [worker("u", a=active()), worker("v", gpu_ids=(1,))]
        assert told(cluster(there, [model("a", pin=True, init_placements=on(1))])) == []


def test_it_is_registered_by_name() -> None:
    assert isinstance(policies["lru"](patience_s=1.0), LruPlacement)
