"""One queue for all models of a GPU: who goes first, who waits, and for how long at most."""

import random
from itertools import accumulate, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.admission.queues import RATE, engine, queued, queues

from prism.scheduling.admission import (
    Admission,
    Bounds,
    EngineCapacity,
    GpuWork,
    MooreHodgsonAdmission,
    PrefillBacklog,
    PrefillBudget,
    QueuedRequest,
)
from prism.scheduling.admission.moore_hodgson import VECTORISED_FROM

pytestmark = pytest.mark.core

EVERYTHING = PrefillBudget(lookahead_s=1e6)
"""Releases the whole queue, in its order."""
USUAL = PrefillBudget()
IDLE = GpuWork()
PATIENT = Bounds(patience=1e6)
ENGINES = {"a": engine(), "b": engine()}


def order(
    queue: list[QueuedRequest],
    engines: dict[str, EngineCapacity] | None = None,
    *,
    now: float = 0.0,
    bounds: Bounds = PATIENT,
    budget: PrefillBudget = EVERYTHING,
    gpu: GpuWork = IDLE,
) -> list[str]:
    return select(queue, engines, now=now, bounds=bounds, budget=budget, gpu=gpu).rids


def select(
    queue: list[QueuedRequest],
    engines: dict[str, EngineCapacity] | None = None,
    *,
    now: float = 0.0,
    bounds: Bounds = PATIENT,
    budget: PrefillBudget = USUAL,
    gpu: GpuWork = IDLE,
) -> Admission:
    return MooreHodgsonAdmission(bounds, budget).select(queue, engines or ENGINES, gpu, now)


def test_the_one_that_is_due_first_goes_first_whatever_its_model() -> None:
    queue = [queued("slow", "a", slo=8.0), queued("fast", "b", slo=1.0)]
    assert order(queue) == ["fast", "slow"]


def test_the_longest_is_given_up_and_served_behind_those_on_time() -> None:
    queue = [
        queued("long", prompt=300, slo=3.0),
        queued("x", slo=3.5),
        queued("y", slo=3.6),
        queued("z", slo=3.7),
    ]
    assert order(queue) == ["x", "y", "z", "long"]


def test_late_ones_are_served_oldest_first() -> None:
    queue = [
        queued("young", arrival=-2, slo=0.5),
        queued("old", arrival=-5, slo=0.5),
        queued("fine", slo=9.0),
    ]
    assert order(queue) == ["fine", "old", "young"]


def test_a_promise_comes_before_none() -> None:
    assert order([queued("none", arrival=-3), queued("promised", slo=50.0)]) == ["promised", "none"]


def test_prefill_that_lies_ahead_counts() -> None:
    queue = [queued("a", slo=1.2), queued("b", slo=2.5)]
    late = GpuWork(prefill_until_s=0.5)
    assert order(queue) == ["a", "b"]
    assert order(queue, gpu=late) == ["b", "a"], "a can't be on time any more"


def kept_on_time(queue: list[QueuedRequest], rids: list[str]) -> int:
    """How many are on time when prefilled one after the other in the order of `rids`, from 0 on."""
    by_rid = {request.rid: request for request in queue}
    met, at = 0, 0.0
    for rid in rids:
        at += by_rid[rid].prompt_tokens / RATE
        met += at <= by_rid[rid].first_token_due_s
    return met


def can_all_be_on_time(chosen: tuple[QueuedRequest, ...]) -> bool:
    due_first = sorted(chosen, key=lambda request: request.first_token_due_s)
    ends = accumulate((request.prompt_tokens / RATE for request in due_first), initial=0.0)
    next(ends)
    return all(end <= request.first_token_due_s for end, request in zip(ends, due_first, strict=True))


@given(queues(10))
def test_no_choice_has_more_on_time(queue: list[QueuedRequest]) -> None:
    met = kept_on_time(queue, order(queue))
    assert not any(can_all_be_on_time(more) for more in combinations(queue, met + 1))


@given(queues(30), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3000), st.floats(0.5, 30))
def test_nobody_is_started_twice_nor_beyond_what_engines_take(
    queue: list[QueuedRequest], running: int, most: int, free: int, patience: float
) -> None:
    capacity = engine(running, most, free)
    rids = order(queue, {"a": capacity}, bounds=Bounds(patience))
    assert len(set(rids)) == len(rids)
    started = [request for request in queue if request.rid in rids]
    assert {request.model for request in started} <= {"a"}
    assert len(started) <= max(0, most - running)
    assert sum(request.tokens for request in started) <= free or (running == 0 and len(started) == 1)


@given(queues(VECTORISED_FROM * 2), st.floats(0.5, 30))
def test_everybody_starts_where_there_is_room(queue: list[QueuedRequest], patience: float) -> None:
    assert sorted(order(queue, bounds=Bounds(patience))) == sorted(request.rid for request in queue)


@given(queues(12) | queues(VECTORISED_FROM * 2, VECTORISED_FROM), st.randoms(), st.floats(0.5, 30))
def test_the_order_of_the_queue_makes_no_difference(
    queue: list[QueuedRequest], chance: random.Random, patience: float
) -> None:
    shuffled = list(queue)
    chance.shuffle(shuffled)
    assert order(shuffled, bounds=Bounds(patience)) == order(queue, bounds=Bounds(patience))


@given(queues(VECTORISED_FROM - 1), st.floats(0.5, 30))
def test_a_long_queue_is_decided_as_a_short_one_is(queue: list[QueuedRequest], patience: float) -> None:
    elsewhere = [queued(f"x{index}", "elsewhere") for index in range(VECTORISED_FROM)]
    assert order(queue + elsewhere, bounds=Bounds(patience)) == order(queue, bounds=Bounds(patience))


class TestWaiting:
    """Nobody waits for ever."""

    def test_who_has_waited_beyond_the_bound_goes_before_all_who_could_be_on_time(self) -> None:
        queue = [queued("due", slo=1.0), queued("aged", arrival=-8, slo=1.0)]
        assert order(queue, bounds=Bounds(patience=9)) == ["due", "aged"]
        assert order(queue, bounds=Bounds(patience=8)) == ["aged", "due"]

    def test_of_several_the_oldest_goes_first_whatever_priorities_and_weights(self) -> None:
        queue = [
            queued("younger", arrival=-9, slo=1.0, priority=5, weight=100.0),
            queued("oldest", arrival=-10, slo=1.0, priority=-5),
        ]
        assert order(queue, bounds=Bounds(8, overaged_share=1.0)) == ["oldest", "younger"]

    def test_a_request_without_a_promise_has_a_bound_too(self) -> None:
        queue = [queued("due", slo=1.0), queued("aged", arrival=-30)]
        assert order(queue, bounds=Bounds(2, unpromised_slo_s=15)) == ["aged", "due"]

    def test_they_get_their_share_and_the_rest_goes_to_who_can_be_on_time(self) -> None:
        queue = [queued(f"aged{i}", arrival=-20 + i, slo=1.0) for i in range(3)] + [queued("due", slo=2.5)]
        had = GpuWork(recent_prefill_s=0.9, recent_overaged_s=0.6)
        had_not = GpuWork(recent_prefill_s=0.9, recent_overaged_s=0.3)
        assert order(queue, bounds=Bounds(8), gpu=had) == ["due", "aged0", "aged1", "aged2"]
        assert order(queue, bounds=Bounds(8), gpu=had_not)[:2] == ["aged0", "due"]

    def test_the_large_one_beyond_its_bound_gets_room_before_small_ones_take_it(self) -> None:
        queue = [queued("large", arrival=-20, output=900, slo=1.0), queued("small", slo=5.0)]
        assert order(queue, {"a": engine(1, free=500)}, bounds=Bounds(8)) == []
        assert order(queue, {"a": engine(1, free=2000)}, bounds=Bounds(8)) == ["large", "small"]

    @given(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=25), st.integers(0, 99)
    )
    def test_under_any_load_a_wait_is_bounded_by_the_older_ones(
        self, drawn: list[tuple[int, int]], seed: int
    ) -> None:
        """On a GPU that is always busy with requests that can be on time, a request beyond its bound waits
        for older ones of its kind, at their share of the GPU, and for nothing else."""
        bounds = Bounds(patience=4.0)
        policy = MooreHodgsonAdmission(bounds)
        chance = random.Random(seed)
        waiting = [
            queued(f"old{i}", "a", 0.0, seconds * 100, float(slo)) for i, (seconds, slo) in enumerate(drawn)
        ]
        work = sum(seconds for seconds, _ in drawn)
        latest = 4.0 * 4 + work / bounds.overaged_share + 2 * (4 + 1)
        now, backlog, number = 0.0, PrefillBacklog(), 0
        while any(request.rid.startswith("old") for request in waiting):
            assert now <= latest, f"{waiting} still wait"
            while sum(request.rid.startswith("new") for request in waiting) < 3:
                number += 1
                waiting.append(queued(f"new{number}", "b", now, 10 * chance.randint(1, 5), 2.0))
            admission = policy.select(waiting, ENGINES, backlog.work(now), now)
            by_rid = {request.rid: request for request in waiting}
            for rid in admission.rids:
                request = by_rid[rid]
                capacity = ENGINES[request.model]
                aged = bounds.waited(request, capacity, now) > 0
                cost = capacity.prefill_cost
                backlog.released(rid, request.model, request.prompt_tokens, cost, now, overaged=aged)
            waiting = [request for request in waiting if request.rid not in admission.rids]
            now = max(now + 0.01, backlog.work(now).prefill_until_s - 0.05)


class TestPrioritiesAndWeights:
    """They decide who is given up, and who is served first among the late."""

    def test_the_lower_priority_is_given_up(self) -> None:
        queue = [queued("low", slo=1.0), queued("high", slo=1.0, prompt=90, priority=1)]
        assert order(queue) == ["high", "low"]

    def test_the_longest_for_its_weight_is_given_up(self) -> None:
        queue = [queued("long", prompt=200, slo=2.5, weight=3.0), queued("short", slo=2.5)]
        assert order(queue) == ["long", "short"]

    def test_a_late_one_of_higher_priority_is_served_first(self) -> None:
        queue = [queued("old", arrival=-9, slo=0.1), queued("high", arrival=-1, slo=0.1, priority=1)]
        assert order(queue) == ["high", "old"]

    def test_waits_count_by_weight_among_the_late(self) -> None:
        queue = [queued("old", arrival=-9, slo=0.1), queued("heavy", arrival=-5, slo=0.1, weight=2.0)]
        assert order(queue) == ["heavy", "old"]


class TestEngines:
    """What engines can't take does not compete with what they can."""

    def test_a_model_that_can_take_nothing_costs_the_others_nothing(self) -> None:
        queue = [queued("blocked", "a", slo=1.0), queued("b", "b", slo=1.5)]
        for closed in (engine(accepting=False), engine(8, 8)):
            assert order(queue, {"a": closed, "b": engine()}) == ["b"]

    def test_one_that_does_not_fit_is_not_overtaken_by_its_own_model(self) -> None:
        queue = [queued("big", prompt=500, slo=9.0), queued("small", slo=20.0), queued("b", "b", slo=30.0)]
        assert order(queue, {"a": engine(1, free=400), "b": engine()}) == ["b"]

    def test_an_engine_that_runs_nothing_takes_one_whatever_its_size(self) -> None:
        queue = [queued("huge", prompt=5000, slo=99.0), queued("next", slo=100.0)]
        assert order(queue, {"a": engine(free=100)}) == ["huge"]

    def test_the_expected_output_counts_not_the_longest_possible(self) -> None:
        queue = [queued(f"{i}", output=1000, expected=100) for i in range(3)]
        assert order(queue, {"a": engine(1, free=400)}) == ["0", "1"]

    def test_who_is_past_the_deadline_is_not_started(self) -> None:
        assert order([queued("gone", deadline=4.0), queued("here")], now=4.0) == ["here"]
        assert order([queued("gone", deadline=4.0)], now=4.0) == []


class TestPrefillBudget:
    """Engines don't prefill all at once."""

    def test_the_next_is_released_shortly_before_the_prefill_ahead_is_done(self) -> None:
        queue = [queued("a", slo=5.0), queued("b", "b", slo=6.0)]
        first = select(queue)
        assert first.rids == ["a"]
        assert first.again_at_s == pytest.approx(0.95)
        ahead = GpuWork(prefill_until_s=1.0)
        assert select(queue[1:], gpu=ahead, now=0.5) == Admission([], 0.95)
        assert select(queue[1:], gpu=ahead, now=0.96).rids == ["b"]

    def test_short_prompts_go_together_until_the_gpu_has_enough(self) -> None:
        queue = [queued(f"{i:02}", prompt=1, slo=5.0) for i in range(20)]
        assert len(select(queue).rids) == 5

    def test_what_has_not_been_measured_holds_nobody_up(self) -> None:
        unmeasured = {"a": EngineCapacity(0, 100, 10**9)}
        assert len(select([queued(f"{i}") for i in range(20)], unmeasured).rids) == 20


FIXED = {"a": engine(fixed=0.02), "b": engine(fixed=0.02)}


class TestPasses:
    """Prompts of one model that are prefilled together share the fixed part of a pass. Here a pass takes 0.02
    s and a prompt of 1 token another 0.01 s."""

    def test_who_joins_a_pass_may_go_beyond_the_lookahead(self) -> None:
        queue = [queued(f"{i:02}", "a", prompt=1, slo=5.0) for i in range(30)]
        other = [queued("b", "b", prompt=1, slo=6.0)]
        assert len(select(queue + other, FIXED).rids) in (21, 22), "12 times the fixed part lie ahead"
        assert len(select(queue + other, ENGINES).rids) == 5, "without a fixed part nothing is gained"

    def test_the_fixed_part_is_paid_by_who_opens_a_pass(self) -> None:
        queue = [queued("x", prompt=1, slo=5.0), queued("y", "b", prompt=1, slo=5.0)]
        ahead = GpuWork(prefill_until_s=0.07)
        waiting = {"a": engine(1, fixed=0.02, waiting=1), "b": engine(fixed=0.02)}
        assert held(queue, FIXED, now=0.0, gpu=ahead) == pytest.approx(0.02)
        assert select(queue, waiting, gpu=ahead).rids == ["x"], "it joins the pass, y would open one"

    def test_a_pass_takes_no_more_than_a_chunk(self) -> None:
        queue = [queued(f"{i}", prompt=1, slo=5.0) for i in range(9)]
        assert len(select(queue, {"a": engine(fixed=0.04, chunk=4)}).rids) == 4

    def test_later_ones_of_the_model_join_before_others_open_a_pass(self) -> None:
        queue = [
            queued(f"{model}{i}", model, prompt=1, slo=5.0 + i / 10) for i in (1, 2, 3) for model in "ab"
        ]
        assert order(queue, FIXED) == ["a1", "a2", "a3", "b1", "b2", "b3"]

    def test_nobody_is_overtaken_who_would_be_late_for_it(self) -> None:
        queue = [queued("a1", prompt=1, slo=0.1), queued("a2", prompt=50, slo=5.0), queued("b", "b", slo=1.2)]
        assert order(queue, FIXED) == ["a1", "b", "a2"]

    def test_nobody_joins_whose_tokens_would_make_the_pass_late_for_another(self) -> None:
        queue = [queued("due", prompt=1, slo=0.035), queued("long", prompt=50, slo=5.0)]
        assert select(queue, FIXED).rids == ["due"]
        assert select(queue[1:], {"a": engine(1, fixed=0.02)}, gpu=GpuWork(0.03), now=0.001).rids == ["long"]
        promised = {"a": engine(1, fixed=0.02, waiting=1, due=0.1)}
        assert select(queue[1:], promised, gpu=GpuWork(0.03)).rids == []
        assert select(queue[1:], promised, now=0.2).rids == ["long"], "it is late already"

    def test_fixed_parts_count_once_in_what_can_be_on_time(self) -> None:
        queue = [queued(f"{i:02}", prompt=1, slo=0.25) for i in range(20)]
        tight = queued("b", "b", prompt=1, slo=0.245, priority=1)
        assert select([*queue[:18], tight], FIXED).rids == [f"{i:02}" for i in range(18)]
        assert len(select([*queue, tight], FIXED).rids) == 19, "b would be late"

    def test_late_ones_fill_passes_too(self) -> None:
        queue = [queued(f"{m}{i}", m, arrival=i / 10 - 5, prompt=1, slo=0.1) for i in range(3) for m in "ab"]
        assert order(queue, FIXED) == ["a0", "a1", "a2", "b0", "b1", "b2"]

    @given(queues(VECTORISED_FROM - 1), st.sampled_from([0.0, 0.25, 2.0]), st.integers(0, 3))
    def test_a_long_queue_is_decided_as_a_short_one_is(
        self, queue: list[QueuedRequest], fixed: float, waiting: int
    ) -> None:
        engines = {"a": engine(fixed=fixed, waiting=waiting), "b": engine(fixed=fixed)}
        elsewhere = [queued(f"x{index}", "elsewhere") for index in range(VECTORISED_FROM)]
        others = [queued("another", "b", slo=1e6), *queue, queued("one", "a", slo=1e6)]
        assert order(others + elsewhere, engines) == order(others, engines)

    @given(queues(30), st.sampled_from([0.25, 2.0]))
    def test_nobody_is_started_twice_and_everybody_in_the_end(
        self, queue: list[QueuedRequest], fixed: float
    ) -> None:
        engines = {"a": engine(fixed=fixed), "b": engine(fixed=fixed)}
        left, now, rids = list(queue), 0.0, []
        for _ in range(3 * len(queue) + 3):
            admission = select(left, engines, now=now)
            rids += admission.rids
            left = [request for request in left if request.rid not in admission.rids]
            now = max(now + 20, admission.again_at_s or 0.0)
        assert sorted(rids) == [request.rid for request in queue]


DECODING = {"a": engine(), "b": engine(4, decoding=4, step=0.03, tpot=0.05)}
"""b needs three fifths of the GPU's time; prefill may have 0.4 s of each second."""


def held(
    queue: list[QueuedRequest], engines: dict[str, EngineCapacity], *, now: float, gpu: GpuWork
) -> float | None:
    """Until when nobody starts."""
    admission = select(queue, engines, now=now, gpu=gpu)
    assert admission.rids == []
    return admission.again_at_s


class TestDecode:
    """A burst of prefills leaves decode the time that was promised."""

    def test_prefill_waits_when_it_had_its_share(self) -> None:
        queue = [queued("x", prompt=10, slo=60.0)]
        assert select(queue, DECODING, gpu=GpuWork(0, recent_prefill_s=0.2)).rids == ["x"]
        assert held(queue, DECODING, now=0.0, gpu=GpuWork(0, recent_prefill_s=0.4)) == pytest.approx(0.1)

    def test_it_waits_only_as_long_as_it_can_still_be_on_time(self) -> None:
        queue = [queued("x", prompt=10, slo=1.0)]
        full = GpuWork(0, recent_prefill_s=0.4)
        assert held(queue, DECODING, now=0.84, gpu=full) == pytest.approx(0.85)
        assert select(queue, DECODING, now=0.86, gpu=full).rids == ["x"]

    def test_the_slack_is_that_of_all_who_wait(self) -> None:
        queue = [queued("x", prompt=10, slo=1.0), queued("y", prompt=80, slo=1.0)]
        full = GpuWork(0, recent_prefill_s=0.4)
        assert held(queue, DECODING, now=0.0, gpu=full) == pytest.approx(0.05)
        assert select(queue, DECODING, now=0.06, gpu=full).rids == ["x"]

    def test_late_ones_wait_for_decode(self) -> None:
        queue = [queued("x", prompt=10, slo=0.01), queued("y", prompt=10, slo=0.01)]
        assert select(queue, DECODING, gpu=GpuWork(0, recent_prefill_s=0.4)).rids == []

    def test_who_has_waited_beyond_the_bound_does_not(self) -> None:
        queue = [queued("x", prompt=10, slo=1.0)]
        gpu = GpuWork(0, recent_prefill_s=0.4)
        assert select(queue, DECODING, now=9.0, bounds=Bounds(8), gpu=gpu).rids == ["x"]

    def test_a_prefill_longer_than_the_share_goes_when_there_was_none(self) -> None:
        assert select([queued("x", prompt=500, slo=60.0)], DECODING).rids == ["x"]

    @pytest.mark.parametrize(
        "quiet",
        [engine(), engine(4, decoding=4, step=0.03), engine(4, decoding=0, step=0.03, tpot=0.05)],
        ids=["nothing runs", "nothing was promised", "nothing decodes"],
    )
    def test_without_a_promise_to_keep_prefill_has_the_whole_gpu(self, quiet: EngineCapacity) -> None:
        gpu = GpuWork(0, recent_prefill_s=1.0)
        assert select([queued("x", slo=60.0)], {"a": engine(), "b": quiet}, gpu=gpu).rids == ["x"]

    def test_a_promise_that_cannot_be_kept_stops_nobody_for_ever(self) -> None:
        lost = {"a": engine(), "b": engine(4, decoding=4, step=0.09, tpot=0.05)}
        queue = [queued("x", prompt=5, slo=60.0)]
        assert select(queue, lost, gpu=GpuWork(0, recent_prefill_s=0.02)).rids == ["x"]
        assert select(queue, lost, gpu=GpuWork(0, recent_prefill_s=0.2)).rids == []
