"""What a GPU has been given."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission import GpuWork, OpenPass, PrefillBacklog, PrefillCost

pytestmark = pytest.mark.core

PER_TOKEN = PrefillCost(0.0, 0.01)
IN_PASSES = PrefillCost(0.5, 0.01, 100)
NONE = OpenPass()


def test_prefills_follow_one_another() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", "m", 50, PER_TOKEN, 10.0)
    backlog.released("b", "m", 25, PER_TOKEN, 10.1)
    assert backlog.work(10.1).prefill_until_s == 10.75


def test_one_that_ends_early_frees_the_gpu_at_once() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", "m", 50, PER_TOKEN, 10.0)
    backlog.released("b", "n", 25, PER_TOKEN, 10.0)
    backlog.prefilled("a", 10.2)
    assert backlog.work(10.2).prefill_until_s == pytest.approx(10.45)
    backlog.prefilled("b", 10.3)
    backlog.prefilled("b", 10.3)
    backlog.prefilled("never heard of", 10.3)
    assert backlog.work(10.3).prefill_until_s == 10.3


def test_one_that_takes_longer_than_was_thought_holds_nobody_up() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", "m", 50, PER_TOKEN, 10.0)
    assert backlog.work(11.0).prefill_until_s == 10.5
    backlog.prefilled("a", 11.0)
    assert backlog.work(11.0).prefill_until_s == 10.5


def test_the_last_second_is_remembered_with_whom_it_went_to() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", "m", 50, PER_TOKEN, 10.0, overaged=True)
    backlog.released("b", "m", 25, PER_TOKEN, 10.5)
    assert backlog.work(10.75) == GpuWork(10.75, 0.75, 0.5)
    assert backlog.work(11.6) == GpuWork(10.75, 0.25, 0.0)
    assert backlog.work(12.0) == GpuWork(10.75, 0.0, 0.0)


def test_what_an_idle_engine_gets_at_one_instant_is_one_pass() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", "m", 10, IN_PASSES, 1.0)
    backlog.released("b", "m", 10, IN_PASSES, 1.0)
    assert backlog.work(1.0).prefill_until_s == pytest.approx(1.7)
    assert backlog.open_pass("m", 1.0) == OpenPass(20, inf)
    assert backlog.open_pass("m", 1.01) == backlog.open_pass("other", 1.0) == NONE


def test_what_comes_while_a_pass_is_computed_shares_the_next() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", "m", 10, IN_PASSES, 1.0)
    backlog.released("b", "m", 10, IN_PASSES, 1.1)
    backlog.released("c", "m", 10, IN_PASSES, 1.2)
    backlog.released("d", "other", 10, IN_PASSES, 1.2)
    assert backlog.work(1.2).prefill_until_s == pytest.approx(1.0 + 0.6 + 0.7 + 0.6)
    assert backlog.open_pass("m", 1.2).tokens == 20
    backlog.prefilled("a", 1.6)
    assert backlog.open_pass("m", 1.6) == NONE, "the next one has begun"
    backlog.released("e", "m", 10, IN_PASSES, 1.7)
    assert backlog.open_pass("m", 1.7).tokens == 10


def test_a_pass_takes_a_chunk_at_most() -> None:
    backlog = PrefillBacklog()
    for number in range(4):
        backlog.released(str(number), "m", 40, IN_PASSES, 1.0)
    assert backlog.work(1.0).prefill_until_s == pytest.approx(1.0 + 2 * 0.5 + 1.6)
    for number in (0, 1):
        backlog.prefilled(str(number), 1.9)
    assert backlog.open_pass("m", 1.9) == NONE


def test_a_pass_is_due_when_the_first_of_those_is_that_can_be_on_time() -> None:
    backlog = PrefillBacklog()
    backlog.released("computing", "m", 10, IN_PASSES, 1.0)
    for rid, due_s in (("lost", 1.2), ("tight", 3.0), ("loose", 9.0)):
        backlog.released(rid, "m", 10, IN_PASSES, 1.1, due_s=due_s)
    assert backlog.open_pass("m", 1.1) == OpenPass(30, 3.0)
    backlog.prefilled("tight", 1.2)
    assert backlog.open_pass("m", 1.2) == OpenPass(20, 9.0)


@given(
    st.lists(
        st.tuples(st.integers(1, 200), st.floats(0, 3), st.booleans(), st.sampled_from("mn"), st.booleans()),
        max_size=30,
    )
)
def test_it_forgets_everything_in_the_end(steps: list[tuple[int, float, bool, str, bool]]) -> None:
    backlog, now = PrefillBacklog(), 0.0
    for number, (tokens, pause, overaged, model, done) in enumerate(steps):
        now += pause
        backlog.released(str(number), model, tokens, IN_PASSES, now, overaged=overaged)
        if done:
            backlog.prefilled(str(number // 2), now)
        work = backlog.work(now)
        assert -1e-9 <= work.recent_overaged_s <= work.recent_prefill_s + 1e-9
        assert 0 <= backlog.open_pass(model, now).tokens <= sum(step[0] for step in steps)
    for number in range(len(steps)):
        backlog.prefilled(str(number), now)
    assert backlog.open_pass("m", now) == backlog.open_pass("n", now) == NONE
    assert backlog.work(now + 1e3) == GpuWork(backlog.work(now).prefill_until_s)
