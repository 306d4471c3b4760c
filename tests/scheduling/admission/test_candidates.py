"""How long a request may wait before it goes ahead of all others."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.admission.queues import RATE, engine, queued

from prism.scheduling.admission import Bounds, EngineCapacity, PrefillBudget
from prism.scheduling.admission.candidates import LEAST_SLO_S, few_candidates, many_candidates

pytestmark = pytest.mark.core

BOUNDS = Bounds(patience=8.0, unpromised_slo_s=10.0)
UNMEASURED = EngineCapacity(0, 8, 10**9)


def waited(slo: float, now: float, prompt: int = 1, on: EngineCapacity = UNMEASURED) -> int:
    return BOUNDS.waited(queued("r", slo=slo, prompt=prompt), on, now)


def test_the_bound_is_a_multiple_of_the_objective() -> None:
    assert [waited(2.0, now) for now in (15.9, 16.0, 32.0, 48.5)] == [0, 1, 2, 3]


def test_without_an_objective_there_is_a_bound_too() -> None:
    assert [waited(inf, now) for now in (79.0, 80.0)] == [0, 1]


@pytest.mark.parametrize("tiny", [0.001, 1e-9])
def test_a_tiny_objective_moves_nobody_ahead_at_once(tiny: float) -> None:
    assert [waited(tiny, now) for now in (7.9 * LEAST_SLO_S, 8 * LEAST_SLO_S)] == [0, 1]


def test_an_objective_shorter_than_its_own_prefill_counts_as_that() -> None:
    five_s = 5 * int(RATE)
    assert [waited(1.0, now, five_s, engine()) for now in (39.0, 40.0)] == [0, 1]
    assert [waited(6.0, now, five_s, engine()) for now in (47.0, 48.0)] == [0, 1]
    assert [waited(1.0, now, five_s, UNMEASURED) for now in (7.9, 8.0)] == [0, 1]


@given(
    st.lists(
        st.tuples(st.floats(1e-3, 20), st.integers(1, 1000), st.floats(0, 200)), min_size=1, max_size=20
    ),
    st.sampled_from([{"a": engine()}, {"a": UNMEASURED}, {}]),
)
def test_short_and_long_queues_agree_on_who_has_waited_too_long(
    drawn: list[tuple[float, int, float]], engines: dict[str, EngineCapacity]
) -> None:
    now = 200.0
    queue = [
        queued(f"{place:02}", arrival=arrival, prompt=prompt, slo=slo)
        for place, (slo, prompt, arrival) in enumerate(drawn)
    ]
    expected = {request.rid for request in queue if engines and BOUNDS.waited(request, engines["a"], now)}
    for gather in (few_candidates, many_candidates):
        found = gather(queue, engines, now, now, BOUNDS, PrefillBudget()).overaged
        assert {request.rid for request in found} == expected
