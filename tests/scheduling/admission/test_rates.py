"""Speeds learned from what engines do, however noisy."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission.rates import PrefillRate, StepTime

pytestmark = pytest.mark.core


def learned(seen: list[tuple[int, float]]) -> PrefillRate:
    rate = PrefillRate()
    for tokens, seconds in seen:
        rate.observe(tokens, seconds)
    return rate


def test_nothing_is_known_before_a_few_prompts() -> None:
    rate = learned([(100, 1.0), (100, 1.0)])
    assert (rate.known, rate.tokens_per_s, rate.fixed_s) == (False, inf, 0.0)
    rate.observe(100, 1.0)
    assert rate.known
    assert rate.fixed_s == 0.0
    assert rate.tokens_per_s == pytest.approx(100.0)


def test_short_and_long_prompts_tell_the_fixed_cost_from_the_rate() -> None:
    rate = learned([(n, 0.02 + n / 1000) for n in (10, 50, 200, 800, 3000)])
    assert rate.tokens_per_s == pytest.approx(1000)
    assert rate.fixed_s == pytest.approx(0.02)


def test_prompts_of_one_length_tell_only_the_rate() -> None:
    rate = learned([(100, 0.12), (110, 0.13), (120, 0.14)])
    assert rate.fixed_s == 0.0
    assert rate.tokens_per_s == pytest.approx(110 / 0.13)


@given(st.lists(st.floats(2, 1000), max_size=4), st.floats(0, 0.5), st.integers(100, 20_000))
def test_single_outliers_change_little(outliers: list[float], fixed: float, tokens_per_s: int) -> None:
    seen = [(n, fixed + n / tokens_per_s) for n in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 31, 77, 911)]
    rate = learned(seen + [(100 * (i + 1), late) for i, late in enumerate(outliers)])
    for n in (100, 1000):
        usual = fixed + n / tokens_per_s
        assert rate.fixed_s + n / rate.tokens_per_s == pytest.approx(usual, rel=0.35, abs=0.02)


def test_a_model_that_became_slower_is_seen_to_be() -> None:
    rate = learned([(100, 0.1)] * 100 + [(100, 0.2)] * 31)
    assert rate.tokens_per_s == pytest.approx(500)


@pytest.mark.parametrize("seen", [(0, 1.0), (10, 0.0), (10, -1.0), (10, nan), (10, inf)])
def test_what_cannot_be_is_left_out(seen: tuple[int, float]) -> None:
    assert not learned([seen] * 5).known


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(1e-6, 100)), min_size=3, max_size=40))
def test_a_prefill_always_takes_some_time(seen: list[tuple[int, float]]) -> None:
    rate = learned(seen)
    assert 0 < rate.tokens_per_s < inf
    assert rate.fixed_s >= 0


def test_a_step_takes_what_steps_usually_take() -> None:
    step = StepTime()
    step.observe(0.02)
    step.observe(0.02)
    assert step.seconds is None
    for seconds in (0.02, 9.0, 0.02, 0.02, nan, -1.0):
        step.observe(seconds)
    assert step.seconds == 0.02
