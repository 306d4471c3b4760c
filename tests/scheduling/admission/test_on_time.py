"""Moore-Hodgson: nobody can have more jobs on time."""

from itertools import accumulate, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission.on_time import late_positions

pytestmark = pytest.mark.core

jobs = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), max_size=10).map(sorted)


def longest_first(seconds: list[float]) -> list[int]:
    return sorted(range(len(seconds)), key=lambda position: -seconds[position])


def on_time(start: float, chosen: list[tuple[int, int]]) -> bool:
    """Whether jobs of (due, seconds), by due time, all end in time."""
    ends = accumulate((seconds for _, seconds in chosen), initial=start)
    next(ends)
    return all(end <= due for end, (due, _) in zip(ends, chosen, strict=True))


@given(jobs, st.integers(0, 10))
def test_it_keeps_as_many_on_time_as_any_choice_does(drawn: list[tuple[int, int]], start: int) -> None:
    seconds = [float(job_s) for _, job_s in drawn]
    late = set(late_positions(start, seconds, [float(due) for due, _ in drawn], longest_first(seconds)))
    kept = [job for position, job in enumerate(drawn) if position not in late]
    assert on_time(start, kept)
    assert not any(on_time(start, list(more)) for more in combinations(drawn, len(kept) + 1))


def test_among_jobs_that_cost_the_same_order_decides_who_is_given_up() -> None:
    assert late_positions(0.0, [1.0, 1.0], [1.0, 1.0], [0, 1]) == [0]
    assert late_positions(0.0, [1.0, 1.0], [1.0, 1.0], [1, 0]) == [1]


def test_nobody_makes_room_for_a_job_that_is_late_anyway() -> None:
    assert late_positions(0.0, [1.0, 9.0, 1.0], [1.0, 2.0, 2.0], [0, 2, 1]) == [1]


def test_as_many_are_given_up_as_one_that_stays_needs() -> None:
    assert sorted(late_positions(0.0, [1.0, 1.0, 3.0], [3.0, 3.0, 3.0], [0, 1, 2])) == [0, 1]


families = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2)), max_size=14).map(
    sorted
)


@given(families, st.integers(0, 10), st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_what_is_kept_is_on_time_with_a_setup_for_each_family(
    drawn: list[tuple[int, int, int]], start: int, setups: list[int]
) -> None:
    """The first of a family pays; without setups as many are kept as without families."""
    seconds = [float(job_s) for _, job_s, _ in drawn]
    dues, of = [float(due) for due, _, _ in drawn], [family for _, _, family in drawn]
    order = longest_first(seconds)
    late = late_positions(start, seconds, dues, order, of, [float(setup_s) for setup_s in setups])
    assert len(set(late)) == len(late)
    paid: set[int] = set()
    jobs = []
    for position, (due, job_s, family) in enumerate(drawn):
        if position not in late:
            jobs.append((due, job_s + (0 if family in paid else setups[family])))
            paid.add(family)
    assert on_time(start, jobs)
    assert late_positions(start, seconds, dues, order, of, [0.0] * 3) == late_positions(
        start, seconds, dues, order
    )


def test_a_family_pays_once() -> None:
    dues, seconds = [6.0, 6.0, 6.0], [1.0, 1.0, 1.0]
    assert late_positions(0.0, seconds, dues, [0, 1, 2], [0, 0, 0], [3.0]) == []
    assert len(late_positions(0.0, seconds, dues, [0, 1, 2], [0, 1, 0], [3.0, 1.0])) == 1
