"""First come, first served: order within a model, independence between models, bounds of each engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission import EngineCapacity, FirstComeAdmission, GpuWork, QueuedRequest, policies

pytestmark = pytest.mark.core

FOREVER = 1e9


def queued(
    rid: str, model: str = "m", arrival: float = 0.0, tokens: int = 10, deadline: float = FOREVER
) -> QueuedRequest:
    return QueuedRequest(rid, model, arrival, tokens - tokens // 2, tokens // 2, deadline)


def engine(
    running: int = 0, max_running: int = 8, free: int = 1000, accepting: bool = True
) -> EngineCapacity:
    return EngineCapacity(running, max_running, free, accepting)


def select(queue: list[QueuedRequest], engines: dict[str, EngineCapacity], now: float = 1.0) -> list[str]:
    return FirstComeAdmission().select(queue, engines, GpuWork(), now).rids


def test_it_is_registered_by_name() -> None:
    assert policies["first_come"] is FirstComeAdmission


def test_the_oldest_starts_first_whatever_the_order_of_the_queue() -> None:
    assert select([queued("b", arrival=2), queued("a", arrival=1)], {"m": engine()}) == ["a", "b"]


def test_an_engine_takes_no_more_than_it_may_run() -> None:
    queue = [queued(f"r{i}", arrival=i) for i in range(5)]
    assert select(queue, {"m": engine(running=6)}) == ["r0", "r1"]


def test_prompt_and_all_that_may_be_generated_must_fit() -> None:
    queue = [
        queued("a", arrival=1, tokens=60),
        queued("b", arrival=2, tokens=50),
        queued("c", arrival=3, tokens=5),
    ]
    assert select(queue, {"m": engine(running=1, free=100)}) == ["a"], "c must not overtake b"


def test_a_model_that_is_full_holds_up_no_other() -> None:
    queue = [queued("a", "full", 1), queued("b", "free", 2)]
    assert select(queue, {"full": engine(running=8), "free": engine()}) == ["b"]


def test_an_idle_engine_takes_a_request_larger_than_its_free_memory() -> None:
    queue = [queued("huge", tokens=5000), queued("next", arrival=1)]
    assert select(queue, {"m": engine(free=100)}) == ["huge"]


def test_engines_that_do_not_accept_or_are_not_there_start_nothing() -> None:
    assert select([queued("a"), queued("b", "unknown")], {"m": engine(accepting=False)}) == []


def test_a_request_past_its_deadline_is_not_started_and_holds_up_nobody() -> None:
    queue = [queued("late", arrival=1, deadline=5.0), queued("b", arrival=2)]
    assert select(queue, {"m": engine()}, now=5.0) == ["b"]


requests = st.builds(
    queued,
    st.uuids().map(str),
    st.sampled_from(["x", "y"]),
    st.floats(0, 10),
    st.integers(1, 200),
    st.sampled_from([0.5, FOREVER]),
)
engines = st.builds(engine, st.integers(0, 4), st.integers(0, 4), st.integers(0, 300), st.booleans())


@given(st.lists(requests, max_size=20), engines, engines)
def test_bounds_hold_for_any_queue(queue: list[QueuedRequest], x: EngineCapacity, y: EngineCapacity) -> None:
    chosen = select(queue, {"x": x, "y": y})
    by_rid = {request.rid: request for request in queue}
    assert len(set(chosen)) == len(chosen)
    for model, capacity in (("x", x), ("y", y)):
        mine = [by_rid[rid] for rid in chosen if by_rid[rid].model == model]
        assert [request.arrival_s for request in mine] == sorted(request.arrival_s for request in mine)
        assert len(mine) <= max(0, capacity.max_running - capacity.running)
        used = sum(request.tokens for request in mine)
        assert used <= capacity.kv_free_tokens or (capacity.running == 0 and len(mine) == 1)
        alone = select([request for request in queue if request.model == model], {model: capacity})
        assert alone == [request.rid for request in mine], "the other model makes no difference"
