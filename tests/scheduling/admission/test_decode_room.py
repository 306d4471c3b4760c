"""Engines that would slow each other beyond what was promised a token do not all begin."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.admission.queues import engine, queued

from prism.scheduling.admission import Bounds, EngineCapacity, GpuWork
from prism.scheduling.admission.decode_room import DecodeRoom
from prism.scheduling.admission.moore_hodgson import MooreHodgsonAdmission
from prism.scheduling.admission.release import LOOK_FOR_ROOM_S, PRESSING

pytestmark = pytest.mark.core

IDLE = GpuWork()
PATIENCE = Bounds().patience
BEYOND_S = PATIENCE + 1.0
"""For so long has one waited whose objective is a second and whose bound is exceeded."""


def decoding(running: int, alone_s: float = 0.01, tpot: float = 0.03) -> EngineCapacity:
    """With a step of a third of what a token is promised in, as long as nobody else computes."""
    found = engine(running, decoding=running, step=alone_s if running else 0.0, tpot=tpot)
    return msgspec.structs.replace(found, decode_alone_s=alone_s)


def busy_since(since: float, running: int = 1, alone_s: float = 0.01, tpot: float = 0.03) -> EngineCapacity:
    return msgspec.structs.replace(decoding(running, alone_s, tpot), busy_since_s=since)


def started(
    engines: dict[str, EngineCapacity], *requests: str, now: float = 0.0, slo: float = 100.0
) -> list[str]:
    queue = [queued(f"{number}{model}", model, 0.0, 1, slo) for number, model in enumerate(requests)]
    return MooreHodgsonAdmission().select(queue, engines, IDLE, now).rids


def test_as_many_begin_as_can_keep_their_promises_together() -> None:
    engines = {name: decoding(0) for name in "abcd"}
    assert started(engines, "a", "b", "c", "d") == ["0a", "1b", "2c"]


def test_the_first_begins_whatever_it_takes() -> None:
    assert started({"a": decoding(0, alone_s=1.0)}, "a") == ["0a"]


def test_an_engine_that_works_already_takes_more() -> None:
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(1), "d": decoding(0)}
    assert started(engines, "d", "a") == ["1a"]


def test_the_tightest_promise_counts() -> None:
    engines = {"a": decoding(1, tpot=0.015), "b": decoding(0, tpot=10.0)}
    assert started(engines, "b") == []


def test_without_a_promise_or_a_measurement_nobody_waits() -> None:
    engines = {name: engine(0) for name in "abcde"}
    assert len(started(engines, *"abcde")) == 5


def test_prefill_takes_its_part_of_the_time() -> None:
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(0)}
    assert DecodeRoom(engines, IDLE).has_room(engines["c"])
    assert not DecodeRoom(engines, GpuWork(recent_prefill_s=0.2)).has_room(engines["c"])


def test_an_engine_that_cannot_keep_its_promise_even_alone_holds_nobody_back() -> None:
    engines = {"a": decoding(1, tpot=0.005), "b": decoding(1), "c": decoding(0)}
    assert started(engines, "c") == ["0c"]


def test_an_engine_that_could_not_keep_its_promise_even_alone_may_begin_where_others_keep_theirs() -> None:
    hopeless = decoding(0, tpot=0.005)
    assert started({"a": decoding(1), "b": decoding(1), "c": hopeless}, "c") == ["0c"]
    assert started({"a": decoding(1), "b": decoding(1), "d": decoding(1), "c": hopeless}, "c") == []


@pytest.mark.parametrize("waited_s", [0.0, BEYOND_S], ids=["in time", "beyond its bound"])
def test_there_is_another_look_for_those_held_back_though_nothing_happens(waited_s: float) -> None:
    """Prefill's share of the time falls while nothing happens, and waits come to exceed their bounds."""
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(1), "d": decoding(0)}
    admission = MooreHodgsonAdmission().select([queued("d", "d", 0.0, 1, 1.0)], engines, IDLE, waited_s)
    assert admission.rids == []
    assert admission.again_at_s == pytest.approx(waited_s + LOOK_FOR_ROOM_S)


def test_there_is_another_look_for_those_for_whom_no_place_was_kept() -> None:
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(0)}
    too_large = queued("old", "a", 0.0, 1, 1.0, output=10**12)
    young = queued("young", "c", BEYOND_S - 0.1, 1, 100.0)
    full = {**engines, "a": msgspec.structs.replace(engines["a"], kv_free_tokens=0)}
    admission = MooreHodgsonAdmission().select([young, too_large], full, IDLE, BEYOND_S)
    assert admission.rids == []
    assert admission.again_at_s == pytest.approx(BEYOND_S + LOOK_FOR_ROOM_S)


def test_one_beyond_its_bound_goes_before_others_begin() -> None:
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(0), "d": decoding(0)}
    old = queued("old", "d", 0.0, 1, 1.0)
    young = queued("young", "c", BEYOND_S - 0.1, 1, 100.0)
    assert MooreHodgsonAdmission().select([young, old], engines, IDLE, BEYOND_S).rids == ["old"]


def test_one_that_has_waited_for_many_times_its_bound_goes_as_the_only_one_too_many() -> None:
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(1), "d": decoding(0), "e": decoding(0)}
    waiting = [queued("d", "d", 0.0, 1, 1.0), queued("e", "e", 0.1, 1, 1.0)]
    admission = MooreHodgsonAdmission()
    assert admission.select(waiting, engines, IDLE, BEYOND_S).rids == []
    assert admission.select(waiting, engines, IDLE, PRESSING * PATIENCE + 0.05).rids == ["d"]


def test_where_too_many_work_those_longest_at_work_take_no_younger_ones_than_who_has_waited_as_long() -> None:
    """Here one engine is too many already, so it is a, until it has run dry."""
    engines = {
        "a": busy_since(3.0, tpot=0.012),
        "b": busy_since(5.0, tpot=0.012),
        "c": decoding(0),
        "d": decoding(0, alone_s=0.0),
    }
    old = queued("old", "c", 1.0, 1, 1.0)
    before, after = (
        [queued(f"{when} {model}", model, at, 1, 100.0) for model in "abd"]
        for when, at in (("before", 0.9), ("after", 1.1))
    )
    admission = MooreHodgsonAdmission()
    queue = [old, *before, *after]
    assert set(admission.select(queue, engines, IDLE, 1.0 + PRESSING * PATIENCE).rids) == {
        "before a",
        "before b",
        "after b",
    }
    dry = engines | {"a": decoding(0, tpot=0.012)}
    assert "old" in admission.select(queue, dry, IDLE, 1.0 + PRESSING * PATIENCE).rids


@given(
    st.lists(st.floats(0, 3), max_size=5),
    st.floats(0, 3),
    st.floats(0, 1),
    st.floats(0.1, 5),
)
def test_whatever_others_do_nobody_waits_for_ever(
    shares: list[float], share: float, recent_prefill_s: float, takes_s: float
) -> None:
    """`shares` are what a step of each of the other engines takes of what it was promised. New requests for
    them never end, each of which runs for `takes_s`; they began one after the other."""
    gpu = GpuWork(recent_prefill_s=recent_prefill_s)
    admission = MooreHodgsonAdmission()
    others = [f"{place}" for place in range(len(shares))]
    ends = {model: [takes_s] for model in others}
    since = dict.fromkeys(others, 0.0)
    queue = [queued("r", "idle", 0.0, 1, 1.0)]
    now, number = 0.0, 0
    while any(request.rid == "r" for request in queue):
        assert now <= PRESSING * PATIENCE + takes_s + 2 * LOOK_FOR_ROOM_S
        now += LOOK_FOR_ROOM_S
        engines = {"idle": decoding(0, share, 1.0)}
        for model, each in zip(others, shares, strict=True):
            ends[model] = [at for at in ends[model] if at > now]
            engines[model] = busy_since(since[model], len(ends[model]), each, 1.0)
            number += 1
            queue.append(queued(f"{number}", model, now, 1, 100.0))
        by_rid = {request.rid: request for request in queue}
        rids = admission.select(queue, engines, gpu, now).rids
        for rid in rids:
            model = by_rid[rid].model
            if model in ends:
                since[model] = since[model] if ends[model] else now
                ends[model].append(now + takes_s)
        queue = [request for request in queue if request.rid not in rids]
