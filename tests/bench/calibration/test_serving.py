"""What served requests took longer than simulated is found again as the costs that made them take so long."""

import msgspec
import pytest

from prism.bench.calibration.probing import Timed
from prism.bench.calibration.serving import fitted_to_served, poisson_trace, served_outcome, serving_trace
from prism.bench.simulation.profiles import read_profile
from prism.bench.traces.trace import Trace, trace_of
from prism.common.messages.models import ModelFacts
from prism.scheduling.cost import ModelCost, model_cost

pytestmark = pytest.mark.core

PROFILE = read_profile("h200")
PASS = 2048
FACTS = {
    name: ModelFacts(name, parameters=10**9, kv_elements_per_token=16384, checkpoint_dtype="bfloat16")
    for name in ("a", "b")
}
COSTS = {name: model_cost(facts, PROFILE) for name, facts in FACTS.items()}


def seen_of(trace: Trace, costs: dict[str, ModelCost]) -> list[Timed]:
    """What a system of these costs would have answered."""
    outcome = served_outcome(trace, FACTS, costs, PROFILE, PASS)
    return [
        Timed(ttft, ttft + tpot * (tokens - 1), tokens)
        for ttft, tpot, tokens in zip(outcome.ttft_s, outcome.tpot_s, trace.output_tokens, strict=True)
    ]


def test_slower_prefills_and_steps_are_found() -> None:
    trace = serving_trace(COSTS, 4096, 2048, duration_s=60.0, seed=1)
    true = {
        name: msgspec.structs.replace(
            cost,
            prefill_fixed_s=cost.prefill_fixed_s + prefill_s,
            decode_fixed_s=cost.decode_fixed_s + step_s,
        )
        for (name, cost), prefill_s, step_s in zip(
            COSTS.items(), (0.02, -0.002), (0.0004, -0.0002), strict=True
        )
    }
    found = fitted_to_served(trace, seen_of(trace, true), FACTS, COSTS, PROFILE, PASS)
    for name, cost in true.items():
        assert found[name].prefill_fixed_s == pytest.approx(cost.prefill_fixed_s, abs=0.0006)
        assert found[name].decode_fixed_s == pytest.approx(cost.decode_fixed_s, abs=0.0001)


def test_costs_that_explain_it_all_stay() -> None:
    trace = serving_trace(COSTS, 4096, 2048, duration_s=20.0, seed=2)
    found = fitted_to_served(trace, seen_of(trace, COSTS), FACTS, COSTS, PROFILE, PASS)
    for name, cost in COSTS.items():
        assert found[name].prefill_fixed_s == pytest.approx(cost.prefill_fixed_s)
        assert found[name].decode_fixed_s == pytest.approx(cost.decode_fixed_s)


def test_one_answer_that_hung_for_seconds_changes_little() -> None:
    trace = serving_trace(COSTS, 4096, 2048, duration_s=60.0, seed=3)
    seen = seen_of(trace, COSTS)
    seen[5] = msgspec.structs.replace(seen[5], ttft_s=seen[5].ttft_s + 5.0, total_s=seen[5].total_s + 5.0)
    found = fitted_to_served(trace, seen, FACTS, COSTS, PROFILE, PASS)
    for name, cost in COSTS.items():
        assert found[name].prefill_fixed_s == pytest.approx(cost.prefill_fixed_s, abs=0.001)


def test_no_cost_is_negative_and_a_model_that_nobody_asked_stays() -> None:
    trace = poisson_trace({"a": COSTS["a"]}, (16, 64), (8, 16), load=0.1, duration_s=20.0, seed=4)
    seen = [Timed(0.0, 0.0, tokens) for tokens in trace.output_tokens]
    found = fitted_to_served(trace, seen, FACTS, COSTS, PROFILE, PASS)
    assert found["a"].prefill_fixed_s == 0.0
    assert found["a"].decode_fixed_s > 0.0
    assert found["b"] == COSTS["b"]


def test_a_short_context_bounds_the_workload() -> None:
    trace = serving_trace(COSTS, 256, 512, duration_s=30.0, seed=5)
    assert max(trace.prompt_tokens) <= 128
    assert max(trace.output_tokens) <= 64
    assert max(serving_trace(COSTS, 1 << 17, 512, duration_s=30.0, seed=5).prompt_tokens) <= 512


def test_prompts_that_one_pass_does_not_take_are_simulated_in_several() -> None:
    rows = [(0.0, 0, 900, 1) for _ in range(4)]
    trace = trace_of(("a",), rows, sort=False)
    costs = {"a": msgspec.structs.replace(COSTS["a"], prefill_fixed_s=0.1, prefill_token_s=1e-9)}
    last = [max(served_outcome(trace, FACTS, costs, PROFILE, tokens).ttft_s) for tokens in (900, 1800, 3600)]
    assert last == sorted(last, reverse=True)
    assert last[0] - last[2] == pytest.approx(0.2, abs=0.01), "four, and one after the first prompt's"
