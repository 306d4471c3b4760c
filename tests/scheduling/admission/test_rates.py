"""Speeds learned from what engines do, however noisy."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission.rates import FORGOTTEN_AFTER, PrefillRate, StepTime

pytestmark = pytest.mark.core


def learned(seen: list[tuple[int, float]]) -> PrefillRate:
    rate = PrefillRate()
    for tokens, seconds in seen:
        rate.observe(tokens, seconds)
    return rate


def seconds(rate: PrefillRate, tokens: int) -> float:
    return rate.fixed_s + tokens / rate.tokens_per_s


def test_nothing_is_known_before_a_few_passes() -> None:
    rate = learned([(100, 1.0), (100, 1.0)])
    assert (rate.known, rate.tokens_per_s, rate.fixed_s, rate.reached_tokens_per_s) == (False, inf, 0.0, inf)
    rate.observe(100, 1.0)
    assert rate.known
    assert seconds(rate, 100) == pytest.approx(1.0)
    assert rate.reached_tokens_per_s == pytest.approx(100.0)


def test_small_and_large_passes_tell_the_fixed_cost_from_the_rate() -> None:
    rate = learned([(n, 0.02 + n / 1000) for n in (10, 50, 200, 800, 3000)])
    assert rate.tokens_per_s == pytest.approx(1000)
    assert rate.fixed_s == pytest.approx(0.02)


def test_passes_of_one_size_are_taken_to_be_fixed_for_the_most_part() -> None:
    """Until larger ones are tried: no prompts would ever go together, were each thought to cost as much."""
    rate = learned([(100, 0.12), (110, 0.13), (120, 0.14)])
    assert seconds(rate, 110) == pytest.approx(0.13)
    assert rate.tokens_per_s == pytest.approx(4 * 110 / 0.13, rel=0.1)


def test_one_burst_tells_what_a_token_costs_though_hundreds_of_single_prompts_follow() -> None:
    rate = learned([(128, 0.0128)] * 40 + [(4096, 0.0525)] + [(128, 0.0128)] * (FORGOTTEN_AFTER - 10))
    assert rate.tokens_per_s == pytest.approx(100_000, rel=0.05)
    assert rate.fixed_s == pytest.approx(0.0115, rel=0.05)


def test_sizes_that_have_not_been_seen_for_long_are_forgotten() -> None:
    """The burst came while others had the GPU, and nothing as large came since."""
    contended = [(128, 0.0128)] * 40 + [(4096, 5.0)] * 9
    assert learned(contended).fixed_s == 0.0
    rate = learned(contended + [(128, 0.0128)] * (FORGOTTEN_AFTER + 1))
    assert rate.fixed_s == pytest.approx(0.75 * 0.0128), "it is as if it had never been"


def test_a_spell_of_contention_does_not_unlearn_the_fixed_part() -> None:
    """Large passes took three times as long as usual lately; small ones have come since."""
    usual = [(n, 0.02 + n / 100_000) for n in (64, 128, 256, 512, 4096) for _ in range(9)]
    contended = [(4096, 1.0)] * 9 + [(2048, 0.5)] * 9
    rate = learned(usual + contended)
    since = [(n, 0.02 + n / 100_000) for n in (64, 512, 128, 256) * 8]
    for tokens, took_s in since:
        rate.observe(tokens, took_s)
    assert rate.fixed_s == pytest.approx(0.02, rel=0.2)


def test_one_pass_corrects_what_was_wrongly_taken_to_be_fixed() -> None:
    rate = learned([(100, 0.1)] * 31)
    assert rate.fixed_s > 0.05
    rate.observe(1000, 1.0)
    assert rate.fixed_s == pytest.approx(0.0, abs=1e-9)
    assert rate.tokens_per_s == pytest.approx(1000)


def test_what_takes_the_same_whatever_the_size_is_fixed() -> None:
    rate = learned([(n, 0.012 - n * 1e-7) for n in (100, 200, 300, 500)])
    assert rate.fixed_s == pytest.approx(0.0105, abs=0.002)
    assert rate.tokens_per_s >= 100_000


def test_prompts_of_several_passes_count_as_passes() -> None:
    rate = PrefillRate()
    for tokens, passes in ((100, 1), (1000, 1), (4000, 4)):
        rate.observe(tokens, passes * 0.02 + tokens / 1000, passes)
    assert rate.fixed_s == pytest.approx(0.02)
    assert rate.tokens_per_s == pytest.approx(1000)


@given(st.lists(st.floats(2, 1000), max_size=4), st.floats(0, 0.5), st.integers(100, 20_000))
def test_single_outliers_change_little(outliers: list[float], fixed: float, tokens_per_s: int) -> None:
    seen = [(n, fixed + n / tokens_per_s) for n in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 31, 77, 911)]
    rate = learned(seen + [(100 * (i + 1), late) for i, late in enumerate(outliers)])
    for n in (100, 1000):
        usual = fixed + n / tokens_per_s
        assert seconds(rate, n) == pytest.approx(usual, rel=0.35, abs=0.02)


def test_a_model_that_became_slower_is_seen_to_be() -> None:
    rate = learned([(100, 0.1)] * 100 + [(100, 0.2)] * 31)
    assert seconds(rate, 100) == pytest.approx(0.2)


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
