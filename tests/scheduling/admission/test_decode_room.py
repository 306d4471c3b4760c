"""Engines that would slow each other beyond what was promised a token do not all begin."""

import msgspec
import pytest
from tests.scheduling.admission.queues import engine, queued

from prism.scheduling.admission import EngineCapacity, GpuWork
from prism.scheduling.admission.decode_room import DecodeRoom
from prism.scheduling.admission.moore_hodgson import MooreHodgsonAdmission

pytestmark = pytest.mark.core

IDLE = GpuWork()


def decoding(running: int, alone_s: float = 0.01, tpot: float = 0.03) -> EngineCapacity:
    """With a step of a third of what a token is promised in, as long as nobody else computes."""
    found = engine(running, decoding=running, step=alone_s if running else 0.0, tpot=tpot)
    return msgspec.structs.replace(found, decode_alone_s=alone_s)


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


def test_one_beyond_its_bound_goes_before_others_begin() -> None:
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(0), "d": decoding(0)}
    old = queued("old", "d", 0.0, 1, 1.0)
    young = queued("young", "c", 8.9, 1, 100.0)
    assert MooreHodgsonAdmission().select([young, old], engines, IDLE, 9.0).rids == ["old"]


def test_one_that_waited_twice_as_long_goes_as_the_only_one_too_many() -> None:
    engines = {"a": decoding(1), "b": decoding(1), "c": decoding(1), "d": decoding(0), "e": decoding(0)}
    waiting = [queued("d", "d", 0.0, 1, 1.0), queued("e", "e", 0.1, 1, 1.0)]
    admission = MooreHodgsonAdmission()
    assert admission.select(waiting, engines, IDLE, 12.0).rids == []
    assert admission.select(waiting, engines, IDLE, 20.0).rids == ["d"]
