"""The benchmark of admission decisions measures what it says."""

import pytest

from prism.bench.scheduling.admission_time import (
    LOADS,
    NOW_S,
    admission_times,
    engines,
    queue_of,
    worker_admission_times,
)
from prism.scheduling.admission import Bounds, policies

pytestmark = pytest.mark.core


def share_on_time(load: str) -> float:
    """How many of 200 could be on time if each were alone."""
    able = engines()
    met = [
        NOW_S + able[request.model].prefill_cost.joining_s(request.prompt_tokens) <= request.first_token_due_s
        for request in queue_of(200, load)
    ]
    return sum(met) / len(met)


def test_loads_are_what_they_are_called() -> None:
    assert share_on_time("on_time") == 1.0
    assert share_on_time("mixed") > 0.5
    assert share_on_time("late") < 0.1


def test_nobody_has_waited_beyond_the_bound() -> None:
    bounds, able = Bounds(), engines()
    assert not any(bounds.waited(request, able[request.model], NOW_S) for request in queue_of(200, "late"))


def test_every_policy_is_measured_at_every_length() -> None:
    rows = admission_times([1, 5], least_s=0.0)
    assert {(row.policy, row.queued) for row in rows} == {(name, n) for name in policies for n in (1, 5)}
    assert all(0 <= row.median_s <= row.worst_s for row in rows)


def test_a_process_of_its_own_measures_every_load() -> None:
    rows = worker_admission_times("moore_hodgson", 5, least_s=0.0)
    assert [row.load for row in rows] == list(LOADS)
    assert all(row.queued == 5 and row.policy == "moore_hodgson" for row in rows)
