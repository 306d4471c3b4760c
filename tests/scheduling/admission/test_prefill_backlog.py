"""What a GPU has been given of prefill."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission import GpuWork, PrefillBacklog

pytestmark = pytest.mark.core


def test_prefills_follow_one_another() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", 0.5, 10.0)
    backlog.released("b", 0.25, 10.1)
    assert backlog.work(10.1).prefill_until_s == 10.75


def test_one_that_ends_early_frees_the_gpu_at_once() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", 0.5, 10.0)
    backlog.released("b", 0.25, 10.0)
    backlog.prefilled("a", 10.2)
    assert backlog.work(10.2).prefill_until_s == pytest.approx(10.45)
    backlog.prefilled("b", 10.3)
    backlog.prefilled("b", 10.3)
    backlog.prefilled("never heard of", 10.3)
    assert backlog.work(10.3).prefill_until_s == 10.3


def test_one_that_takes_longer_than_was_thought_holds_nobody_up() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", 0.5, 10.0)
    assert backlog.work(11.0).prefill_until_s == 10.5
    backlog.prefilled("a", 11.0)
    assert backlog.work(11.0).prefill_until_s == 10.5


def test_the_last_second_is_remembered_with_whom_it_went_to() -> None:
    backlog = PrefillBacklog()
    backlog.released("a", 0.5, 10.0, overaged=True)
    backlog.released("b", 0.25, 10.5)
    assert backlog.work(10.75) == GpuWork(10.75, 0.75, 0.5)
    assert backlog.work(11.6) == GpuWork(10.75, 0.25, 0.0)
    assert backlog.work(12.0) == GpuWork(10.75, 0.0, 0.0)


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 3), st.booleans()), max_size=30))
def test_it_forgets_everything_in_the_end(steps: list[tuple[float, float, bool]]) -> None:
    backlog, now = PrefillBacklog(), 0.0
    for number, (seconds, pause, overaged) in enumerate(steps):
        now += pause
        backlog.released(str(number), seconds, now, overaged=overaged)
        work = backlog.work(now)
        assert -1e-9 <= work.recent_overaged_s <= work.recent_prefill_s + 1e-9
    assert backlog.work(now + 1e3) == GpuWork(backlog.work(now).prefill_until_s)
