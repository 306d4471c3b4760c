"""Small cases against what they come to by hand, and what holds whatever happens."""

import random
from math import isnan

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bench.simulation.small import PROFILE, Row, cost, model, run, simulation

from prism.bench.simulation.report import report
from prism.bench.simulation.simulation import Limits, Simulation
from prism.common.messages.models import ModelState
from prism.scheduling.admission import MooreHodgsonAdmission
from prism.scheduling.placement.actions import Action, Activate, Doze, Plan, Release
from prism.scheduling.placement.snapshot import ClusterSnapshot

pytestmark = pytest.mark.core


def test_a_request_alone_has_its_prefill_as_ttft_and_a_step_as_tpot() -> None:
    outcome = run([model(0)], [(0.0, 0, 50, 11)])
    assert outcome.ttft_s[0] == pytest.approx(1.0)
    assert outcome.tpot_s[0] == pytest.approx(0.1)
    assert outcome.end_s == pytest.approx(2.0)


def test_the_way_to_the_engine_adds_to_ttft_and_keeps_no_gpu_busy() -> None:
    slow = msgspec.structs.replace(cost(), request_s=0.3)
    outcome = run([model(0, slow)], [(0.0, 0, 50, 1)])
    assert outcome.ttft_s[0] == pytest.approx(1.3)
    assert outcome.busy_gpu_s == pytest.approx(1.0)


def test_steps_grow_with_the_kv_cache() -> None:
    # 50 tokens of prompt and 1 of output after the prefill; 10 steps end with 61, 56 on average.
    outcome = run([model(0, cost(decode_kv_token_s=0.001))], [(0.0, 0, 50, 11)])
    assert outcome.tpot_s[0] == pytest.approx(0.1 + 56 * 0.001)


def test_two_engines_that_compute_at_once_take_twice_as_long() -> None:
    outcome = run([model(0), model(1)], [(0.0, 0, 50, 1), (0.0, 1, 50, 1)])
    assert list(outcome.ttft_s) == pytest.approx([2.0, 2.0])


def test_an_engine_speeds_up_when_the_other_one_is_done() -> None:
    # Both at half speed until 2.0, when the short one is done; the long one has 1 s of 2 left.
    outcome = run([model(0), model(1)], [(0.0, 0, 50, 1), (0.0, 1, 150, 1)])
    assert list(outcome.ttft_s) == pytest.approx([2.0, 3.0])


def test_a_prefill_that_leaves_the_gpu_to_others_takes_as_long_as_alone() -> None:
    # The second prefills from 1.1 to 2.1; meanwhile the first decodes at half speed: 1 + 5 + 4 steps.
    profile = msgspec.structs.replace(PROFILE, prefill_parallel_engines=2.0)
    outcome = run([model(0), model(1)], [(0.0, 0, 50, 11), (1.1, 1, 50, 1)], profile=profile)
    assert list(outcome.ttft_s) == pytest.approx([1.0, 1.0])
    assert outcome.tpot_s[0] == pytest.approx((0.1 + 1.0 + 0.4) / 10)


def test_engines_that_prefill_at_once_may_take_as_long_as_alone_and_still_decode_in_turns() -> None:
    profile = msgspec.structs.replace(PROFILE, prefill_parallel_engines=2.0)
    outcome = run([model(0), model(1)], [(0.0, 0, 50, 11), (0.0, 1, 50, 11)], profile=profile)
    assert list(outcome.ttft_s) == pytest.approx([1.0, 1.0])
    assert list(outcome.tpot_s) == pytest.approx([0.2, 0.2])


@given(parallel=st.floats(1.0, 4.0), rest=st.floats(0.0, 3.0))
def test_a_prefill_is_shared_no_further_than_a_profile_says(parallel: float, rest: float) -> None:
    rows = [(0.0, 0, 50, 40), (0.3, 1, 80, 40), (0.5, 2, 20, 40)]
    models = [model(index) for index in range(3)]
    steps = msgspec.structs.replace(PROFILE, parallel_engines=parallel)
    alike = msgspec.structs.replace(steps, prefill_parallel_engines=parallel)
    wider = msgspec.structs.replace(steps, prefill_parallel_engines=parallel + rest)
    unsaid = run(models, rows, profile=steps)
    assert unsaid.ttft_s == run(models, rows, profile=alike).ttft_s
    sooner = run(models, rows, profile=wider)
    assert all(a <= b + 1e-9 for a, b in zip(sooner.ttft_s, unsaid.ttft_s, strict=True))


def test_engines_on_different_gpus_do_not_slow_each_other() -> None:
    outcome = run([model(0), model(1, gpus=(1,))], [(0.0, 0, 50, 1), (0.0, 1, 50, 1)], gpus=2)
    assert list(outcome.ttft_s) == pytest.approx([1.0, 1.0])


def test_a_tensor_parallel_instance_is_as_slow_as_its_busiest_gpu() -> None:
    wide = model(1, gpus=(0, 1))
    outcome = run([model(0), wide], [(0.0, 0, 50, 1), (0.0, 1, 50, 1)], gpus=2)
    assert outcome.ttft_s[1] == pytest.approx(2.0)


def test_prompts_that_wait_together_are_prefilled_together() -> None:
    # The first is under way for 1 s; the next two share one fixed cost: 0.5 + 2 * 0.5.
    outcome = run([model(0)], [(0.0, 0, 50, 1), (0.1, 0, 50, 1), (0.2, 0, 50, 1)])
    assert list(outcome.ttft_s) == pytest.approx([1.0, 2.4, 2.3])


def test_a_prefill_waits_for_the_step_under_way_and_stops_decoding() -> None:
    # Decoding begins at 1.0; the second comes within the step that ends at 1.1 and prefills until 2.1.
    outcome = run([model(0)], [(0.0, 0, 50, 11), (1.05, 0, 50, 1)])
    assert outcome.ttft_s[1] == pytest.approx(2.1 - 1.05)
    assert outcome.tpot_s[0] == pytest.approx((10 * 0.1 + 1.0) / 10)


def test_a_long_prompt_goes_in_chunks() -> None:
    outcome = run([model(0)], [(0.0, 0, 250, 1)], limits=Limits(chunk_tokens=100))
    assert outcome.ttft_s[0] == pytest.approx(3 * 0.5 + 250 * 0.01)


def test_queueing_is_that_of_one_server_with_constant_service() -> None:
    """Pollaczek and Khinchin for M/D/1: the mean wait is rho * s / (2 * (1 - rho))."""
    service, rho = 0.5, 0.7
    random_ = random.Random(7)
    now, rows = 0.0, []
    for _ in range(40_000):
        now += random_.expovariate(rho / service)
        rows.append((now, 0, 50, 1))
    one_at_a_time = Limits(chunk_tokens=50, plan_interval_s=1000.0, deadline_s=1e6)
    outcome = run([model(0, cost(prefill_fixed_s=0.0))], rows, limits=one_at_a_time)
    wait = sum(outcome.ttft_s) / len(rows) - service
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05)


def test_a_sleeping_model_is_woken_by_a_request() -> None:
    outcome = run([model(0, on=False)], [(3.0, 0, 50, 1)])
    # Staged: a shell takes it in a second, two more for the copy.
    assert outcome.ttft_s[0] == pytest.approx(3.0 + 1.0)
    assert outcome.activations == [1]


def test_copies_to_one_gpu_go_one_after_the_other() -> None:
    models = [model(0, on=False), model(1, on=False)]
    outcome = run(models, [(0.0, 0, 50, 1), (0.0, 1, 50, 1)])
    assert outcome.ttft_s[0] == pytest.approx(3.0 + 1.0)
    assert outcome.ttft_s[1] == pytest.approx(5.0 + 1.0)


def test_a_model_that_fits_nowhere_is_missed_after_the_deadline() -> None:
    large = model(0, cost(weights_bytes=5000))
    outcome = run([large], [(0.0, 0, 50, 1)], memory_bytes=1000, limits=Limits(deadline_s=5.0))
    assert isnan(outcome.ttft_s[0])
    result = report(outcome)
    assert (result["completed"], result["both_attainment"]) == (0, 0.0)
    assert result["models"]["m0"]["note"]


def test_a_request_waits_for_kv_memory_where_quotas_do_not_move() -> None:
    # 50 + 100 tokens are counted on for each, and the quota holds 200: one after the other.
    fixed = Limits(elastic=False)
    rows = [(0.0, 0, 50, 11), (0.0, 0, 50, 11)]
    outcome = run([model(0, kv_tokens=200)], rows, limits=fixed)
    assert list(outcome.ttft_s) == pytest.approx([1.0, 2.0 + 1.0])


def test_quotas_follow_demand_where_they_move() -> None:
    # Two contexts of 1000 tokens are reserved for each, 8000 bytes; 30 requests of 150 tokens want 18000.
    models = [
        msgspec.structs.replace(each, spec=msgspec.structs.replace(each.spec, init_placements=[]))
        for each in (model(0), model(1))
    ]
    rows: list[Row] = [(0.0, 1, 50, 2)] + [(20.0, 0, 50, 90)] * 30
    made = simulation(models, rows, memory_bytes=16_400)
    made.run()
    hot, idle = (made.placement.workers["worker-0"].instances[name] for name in ("m0", "m1"))
    assert hot.quota_bytes > 8000
    assert 4000 <= idle.quota_bytes < 8000, "a request of full length fits in any case"
    assert hot.quota_bytes + idle.quota_bytes + 200 <= 16_400


def test_sequences_beyond_the_quota_are_retracted_and_come_back() -> None:
    # Short answers teach the queue to count on little; then three long ones outgrow the quota together.
    rows: list[Row] = [(5.0 * index, 0, 10, 2) for index in range(20)]
    rows += [(200.0, 0, 50, 100), (200.0, 0, 50, 100), (200.0, 0, 50, 100)]
    outcome = run([model(0, kv_tokens=250)], rows, limits=Limits(elastic=False))
    assert outcome.retracted > 0
    assert list(outcome.ended) == [1] * len(rows)
    assert not any(isnan(value) for value in outcome.tpot_s)


class _Restless:
    """Puts models away and wakes them for no reason, as no policy should: nothing may be lost by it."""

    def __init__(self, seed: int, *, drain_s: float) -> None:
        self._random = random.Random(seed)
        self._drain_s = drain_s

    def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
        commanded = {(command.worker, command.model) for command in snapshot.in_flight}
        actions: list[Action] = []
        for worker in snapshot.workers:
            for name in snapshot.models:
                here = worker.models.get(name)
                state = here.state if here else ModelState.COLD
                if (worker.id, name) in commanded or self._random.random() < 0.5:
                    continue
                if state is ModelState.ACTIVE:
                    kind = Doze if self._random.random() < 0.7 else Release
                    if kind is Doze:
                        actions.append(Doze(name, worker.id, self._drain_s, "restless"))
                    else:
                        actions.append(Release(name, worker.id, "restless"))
                elif state in (ModelState.DOZING, ModelState.STAGED, ModelState.COLD):
                    actions.append(Activate(name, worker.id, 4000, 4100, "restless"))
        return Plan(tuple(actions))


rows_of = st.lists(
    st.tuples(st.floats(0, 30), st.integers(0, 2), st.integers(1, 80), st.integers(1, 60)),
    min_size=1,
    max_size=30,
)


def _check_memory(made: Simulation) -> None:
    for gpu in made.gpus:
        held = sum(
            each.weights_bytes + each.quota_bytes + each.context_bytes for each in gpu.residents.values()
        )
        assert gpu.reserved_bytes == held <= gpu.limit_bytes


@given(
    rows=rows_of, seed=st.integers(0, 1000), drain_s=st.sampled_from([0.0, 0.5, 20.0]), elastic=st.booleans()
)
@settings(max_examples=60)
def test_every_request_ends_exactly_once_and_memory_is_never_exceeded(
    rows: list[Row], seed: int, drain_s: float, elastic: bool
) -> None:
    models = [model(0), model(1), model(2, gpus=(0, 1))]
    made = simulation(
        models,
        rows,
        gpus=2,
        memory_bytes=10_000,
        placement=_Restless(seed, drain_s=drain_s),
        admission=MooreHodgsonAdmission(),
        limits=Limits(elastic=elastic, deadline_s=300.0),
    )
    plan = made.placement.plan

    def checked(now: float) -> int:
        _check_memory(made)
        count = plan(now)
        _check_memory(made)
        return count

    made.placement.plan = checked  # type: ignore[method-assign]  # looks on
    outcome = made.run()
    assert list(outcome.ended) == [1] * len(rows)
    for ttft, tpot in zip(outcome.ttft_s, outcome.tpot_s, strict=True):
        assert isnan(ttft) == isnan(tpot)
        assert isnan(ttft) or (ttft > 0 and tpot >= 0)


@given(rows=rows_of)
@settings(max_examples=20)
def test_the_same_input_gives_the_same_result(rows: list[Row]) -> None:
    def once() -> object:
        return report(run([model(0), model(1), model(2, on=False)], rows, memory_bytes=90_000))

    assert once() == once()


def test_what_is_left_when_a_drain_runs_out_goes_on_elsewhere() -> None:
    class Mover:
        def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
            first, second = snapshot.workers
            here, there = first.models.get("m0"), second.models.get("m0")
            if here is None and now < 5:
                return Plan((Activate("m0", first.id, 4000, 4100, "initial"),))
            if now >= 5 and there is None:
                return Plan((Activate("m0", second.id, 4000, 4100, "move"),))
            both = here and there and here.state is there.state is ModelState.ACTIVE
            return Plan((Doze("m0", first.id, 1.0, "moved"),)) if both else Plan()

    # Active at 0; busy from 1 on with 400 steps of 0.1 s; the target is up at 8, the drain ends at 9.
    outcome = run([model(0, max_new_tokens=500)], [(1.0, 0, 50, 401)], gpus=2, placement=Mover())
    assert list(outcome.ended) == [1]
    assert outcome.migrations == [1]
    # 40 s of decoding, and the replayed tokens are prefilled once more.
    assert 41.0 < outcome.end_s < 46.0
