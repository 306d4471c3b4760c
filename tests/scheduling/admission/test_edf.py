"""Earliest deadline first: by due time, on time or not."""

import pytest
from hypothesis import given
from tests.scheduling.admission.queues import engine, queued, queues

from prism.scheduling.admission import EdfAdmission, GpuWork, PrefillBudget, QueuedRequest, policies

pytestmark = pytest.mark.core

ENGINES = {"a": engine(), "b": engine()}


def test_it_is_registered_by_name() -> None:
    assert policies["edf"] is EdfAdmission


def test_the_earliest_goes_first_even_if_it_is_late() -> None:
    queue = [queued("fine", slo=5.0), queued("late", "b", arrival=-5, slo=0.1)]
    admission = EdfAdmission().select(queue, ENGINES, GpuWork(), 0.0)
    assert admission.rids == ["late"]
    assert admission.again_at_s == pytest.approx(0.95)
    assert EdfAdmission().select(queue, ENGINES, GpuWork(2.0), 0.0).again_at_s == pytest.approx(1.95)


@given(queues(20))
def test_everybody_is_released_by_due_time(queue: list[QueuedRequest]) -> None:
    rids = EdfAdmission(PrefillBudget(lookahead_s=1e6)).select(queue, ENGINES, GpuWork(), 0.0).rids
    dues = {request.rid: request.first_token_due_s for request in queue}
    assert sorted(rids) == sorted(dues)
    assert [dues[rid] for rid in rids] == sorted(dues.values())
