"""Parked requests: caps, one wake for all, bookkeeping."""

import asyncio

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gateway.parking import Parking

pytestmark = pytest.mark.core


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_caps_hold_per_model_and_in_all() -> None:
    parking = Parking(Clock(), per_model=2, total=3)
    with parking.place("a"), parking.place("a"):
        with pytest.raises(PrismError, match="'a'") as caught, parking.place("a"):
            pass
        assert caught.value.code is ErrorCode.OVERLOADED
        with parking.place("b"), pytest.raises(PrismError, match="for models to wake"), parking.place("c"):
            pass
        with parking.place("c"):
            assert parking.models() == ["a", "c"]
    assert parking.models() == []


def test_work_in_progress_parks_beyond_every_cap_and_takes_nobodys_place() -> None:
    parking = Parking(Clock(), per_model=1, total=2)
    with parking.place("a", begun=True), parking.place("a", begun=True), parking.place("b", begun=True):
        with parking.place("a"), parking.place("b"), parking.place("a", begun=True):
            assert (parking.count("a"), parking.count("b")) == (4, 2)
            with pytest.raises(PrismError, match="2 requests wait for models"), parking.place("c"):
                pass
        with (
            parking.place("a"),
            pytest.raises(PrismError, match="1 requests wait for 'a'"),
            parking.place("a"),
        ):
            pass
    assert parking.models() == []


def test_oldest_wait_is_that_of_the_first_still_here() -> None:
    clock = Clock()
    parking = Parking(clock, per_model=9, total=9)
    with parking.place("a"):
        clock.now = 12.0
        with parking.place("a"):
            clock.now = 15.0
            assert (parking.count("a"), parking.oldest_s("a")) == (2, 5.0)
    assert (parking.count("a"), parking.oldest_s("a")) == (0, 0.0)


def test_a_request_that_parks_again_has_waited_since_it_first_did() -> None:
    clock = Clock()
    parking = Parking(clock, per_model=9, total=9)
    with parking.place("a"), parking.place("a", since=4.0):
        assert parking.oldest_s("a") == 6.0


async def test_one_wake_reaches_all_who_wait_for_the_model() -> None:
    parking = Parking(asyncio.get_running_loop().time, per_model=300, total=300)
    parked = asyncio.Semaphore(0)
    woken: list[str] = []

    async def wait(model: str) -> None:
        with parking.place(model) as place:
            parked.release()
            await place.woken(30)
            woken.append(model)

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(wait("a")) for _ in range(200)]
        other = tasks.create_task(wait("b"))
        for _ in range(201):
            await parked.acquire()
        parking.wake("a")
        await asyncio.wait(waiting)
        assert woken == ["a"] * 200
        assert not other.done()
        parking.wake("b")


async def test_wait_ends_after_its_time() -> None:
    parking = Parking(asyncio.get_running_loop().time, per_model=1, total=1)
    with parking.place("a") as place:
        await asyncio.wait_for(place.woken(0.01), 5)


def test_each_change_is_told() -> None:
    told: list[int] = []
    parking = Parking(
        Clock(), per_model=9, total=9, on_change=lambda model: told.append(parking.count(model))
    )
    with parking.place("a"), parking.place("a"):
        pass
    assert told == [1, 2, 1, 0]
