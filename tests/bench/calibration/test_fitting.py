"""A cost is recovered from what it would have been measured as."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.bench.calibration.fitting import (
    fitted_cost,
    fitted_profile,
    nonnegative_fit,
    prefill_slowdown,
)
from prism.bench.calibration.probing import BATCHES, BURST_PASSES, PROMPTS, Beside, Probe
from prism.bench.simulation.gpu import Gpu
from prism.bench.simulation.profiles import read_profile
from prism.common.messages.models import ModelFacts
from prism.scheduling.cost import ModelCost, model_cost

pytestmark = pytest.mark.core

FACTS = ModelFacts("m", parameters=10**6, kv_elements_per_token=100, checkpoint_dtype="float32")


def measured(cost: ModelCost, pass_tokens: int, burst: int, longest: int) -> Probe:
    """What probing a model of that cost sees, without noise: prompts of `longest` tokens at most, and
    `burst` of them at once."""

    def burst_s(prompts: int) -> float:
        seconds, left = cost.request_s, prompts * longest
        while left > 0:
            taken = min(left, pass_tokens)
            seconds += cost.prefill_s(taken)
            left -= taken
        return seconds

    return Probe(
        "m",
        pass_tokens,
        {length: cost.request_s + cost.prefill_s(length) for length in PROMPTS if length <= longest},
        longest,
        {count: burst_s(count) for count in (1, burst)},
        [
            (batch, batch * held, cost.decode_step_s(batch, batch * held))
            for held in (40, 280)
            for batch in BATCHES
        ],
    )


@given(
    request_s=st.floats(0, 0.1),
    prefill_fixed_s=st.floats(0, 0.1),
    prefill_token_s=st.floats(1e-6, 1e-2),
    decode_fixed_s=st.floats(1e-4, 0.1),
    decode_sequence_s=st.floats(0, 0.01),
    decode_kv_token_s=st.floats(0, 1e-4),
    longest=st.sampled_from([512, 1024, 2048]),
    pass_tokens=st.sampled_from([2048, 3000, 8192]),
)
def test_the_cost_behind_a_measurement_is_found(
    request_s: float,
    prefill_fixed_s: float,
    prefill_token_s: float,
    decode_fixed_s: float,
    decode_sequence_s: float,
    decode_kv_token_s: float,
    longest: int,
    pass_tokens: int,
) -> None:
    base = read_profile("h200")
    true = msgspec.structs.replace(
        model_cost(FACTS, base),
        request_s=request_s,
        prefill_fixed_s=prefill_fixed_s,
        prefill_token_s=prefill_token_s,
        decode_fixed_s=decode_fixed_s,
        decode_sequence_s=decode_sequence_s,
        decode_kv_token_s=decode_kv_token_s,
    )
    burst = BURST_PASSES * pass_tokens // longest
    found = fitted_cost(measured(true, pass_tokens, burst, longest), FACTS, base, None)
    for field in ModelCost.__struct_fields__:
        assert getattr(found, field) == pytest.approx(getattr(true, field), rel=1e-3, abs=1e-6), field


def test_a_burst_that_one_pass_takes_leaves_the_sum() -> None:
    base = read_profile("h200")
    true = msgspec.structs.replace(model_cost(FACTS, base), request_s=0.01, prefill_fixed_s=0.02)
    found = fitted_cost(measured(true, 8192, 8, 512), FACTS, base, None)
    assert found.request_s + found.prefill_fixed_s == pytest.approx(0.03)


@given(slow=st.floats(1.0, 1.3), length=st.sampled_from([8, 64, 128, 256, 512]))
def test_one_prompt_that_took_longer_puts_none_off_by_more_than_itself(slow: float, length: int) -> None:
    base = read_profile("h200")
    true = msgspec.structs.replace(
        model_cost(FACTS, base), request_s=0.002, prefill_fixed_s=0.008, prefill_token_s=3e-4
    )
    seen = measured(true, 512, 6, 512)
    seen.first_token_s[length] *= slow
    found = fitted_cost(seen, FACTS, base, None)
    for prompt in (16, 200, 400):
        expected = true.request_s + true.prefill_s(prompt)
        assert found.request_s + found.prefill_s(prompt) == pytest.approx(expected, rel=slow - 1 + 1e-6)


def test_no_cost_is_negative() -> None:
    found = nonnegative_fit([(1.0, 1.0), (1.0, 2.0), (1.0, 4.0)], [3.0, 2.0, 1.0])
    assert found[0] == pytest.approx(2.0)
    assert found[1] == 0.0


NUMBERS = st.integers(-4, 4).map(float)


@given(
    rows=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=3, max_size=6),
    targets=st.lists(NUMBERS, min_size=6, max_size=6),
)
def test_no_other_coefficients_of_0_or_more_fit_better(
    rows: list[tuple[float, float, float]], targets: list[float]
) -> None:
    matrix, target = np.array(rows), np.array(targets[: len(rows)])
    found = nonnegative_fit(rows, targets[: len(rows)])
    assert min(found) >= 0.0
    # The conditions of Karush, Kuhn and Tucker: no direction that is allowed leads down.
    slopes = matrix.T @ (matrix @ np.array(found) - target)
    for value, slope in zip(found, slopes, strict=True):
        assert slope >= -1e-6
        assert value * slope == pytest.approx(0.0, abs=1e-6)


def test_the_profile_of_a_device_gives_its_models_their_costs_again() -> None:
    base = msgspec.structs.replace(read_profile("h200"), decode_fixed_s=0.0)
    cost = msgspec.structs.replace(model_cost(FACTS, base), prefill_fixed_s=0.01, request_s=0.02)
    profile = fitted_profile({"m": cost}, {"m": FACTS}, base, slowdown=1.0, prefill_slowdown=1.0, name="mine")
    again = model_cost(FACTS, profile)
    assert again.prefill_fixed_s == pytest.approx(0.01)
    assert again.prefill_token_s == pytest.approx(cost.prefill_token_s)
    assert again.request_s == 0.02
    assert again.context_bytes == profile.context_bytes == cost.context_bytes > 0


@pytest.mark.parametrize(
    ("slowdown", "parallel"), [(1.0, 2.0), (1.25, 1.6), (2.0, 1.0), (0.9, 2.0), (3.0, 1.0)]
)
def test_engines_that_do_not_slow_each_other_run_in_parallel(slowdown: float, parallel: float) -> None:
    base = read_profile("h200")
    costs = dict.fromkeys(("m", "n"), model_cost(FACTS, base))
    facts = dict.fromkeys(costs, FACTS)
    steps = fitted_profile(costs, facts, base, slowdown=slowdown, prefill_slowdown=1.5, name="x")
    assert steps.parallel_engines == parallel
    prefills = fitted_profile(costs, facts, base, slowdown=1.5, prefill_slowdown=slowdown, name="x")
    assert prefills.prefill_parallel_engines == parallel


@given(
    slowdown=st.floats(1.0, 3.0),
    request_s=st.floats(0.0, 0.1),
    prefill_fixed_s=st.floats(1e-3, 0.1),
    count=st.integers(2, 5),
)
def test_simulated_prefills_beside_others_take_as_long_as_measured(
    slowdown: float, request_s: float, prefill_fixed_s: float, count: int
) -> None:
    base = read_profile("h200")
    cost = msgspec.structs.replace(
        model_cost(FACTS, base), request_s=request_s, prefill_fixed_s=prefill_fixed_s
    )
    costs = {f"m{index}": cost for index in range(count)}
    # The way to the engine takes as long as ever.
    seen = [
        Beside(model, 100, request_s + cost.prefill_s(100), request_s + slowdown * cost.prefill_s(100))
        for model in costs
    ]
    profile = fitted_profile(
        costs,
        dict.fromkeys(costs, FACTS),
        base,
        slowdown=2.0,
        prefill_slowdown=prefill_slowdown(seen, costs),
        name="x",
    )
    gpu = Gpu(0, 1, profile.parallel_engines, profile.prefill_parallel_engines)
    assert gpu.prefill_shares(count) == pytest.approx(min(slowdown, count))
