"""Releasing requests one by one: when to look again at those that could not be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.admission.queues import engine, queued, queues

from prism.scheduling.admission import (
    SHORTEST_WAIT_S,
    AdmissionPolicy,
    EdfAdmission,
    GpuWork,
    MooreHodgsonAdmission,
    QueuedRequest,
)

pytestmark = pytest.mark.core


def test_who_would_make_a_pass_late_is_not_looked_at_again_at_once() -> None:
    """All prefill that lies ahead is thought to be done now, and the pass has not begun yet."""
    promised = {"a": engine(1, fixed=0.02, waiting=1, due=0.1)}
    admission = MooreHodgsonAdmission().select(
        [queued("long", prompt=50, slo=5.0)], promised, GpuWork(), 0.05
    )
    assert admission.rids == []
    assert admission.again_at_s == pytest.approx(0.05 + SHORTEST_WAIT_S)


@pytest.mark.parametrize("policy", [MooreHodgsonAdmission(), EdfAdmission()])
@given(
    queue=queues(8, 1),
    waiting=st.integers(0, 2),
    due=st.floats(0, 2),
    fixed=st.sampled_from([0.0, 0.02]),
    until=st.sampled_from([0.0, 0.05, 0.07, 1.0]),
    recent=st.sampled_from([0.0, 0.4, 0.9]),
)
def test_the_next_look_is_never_at_once(
    policy: AdmissionPolicy,
    queue: list[QueuedRequest],
    waiting: int,
    due: float,
    fixed: float,
    until: float,
    recent: float,
) -> None:
    engines = {
        "a": engine(1, fixed=fixed, waiting=waiting, due=due),
        "b": engine(4, decoding=4, step=0.03, tpot=0.05, fixed=fixed),
    }
    again_at_s = policy.select(queue, engines, GpuWork(until, recent), 0.0).again_at_s
    assert again_at_s is None or again_at_s >= SHORTEST_WAIT_S
