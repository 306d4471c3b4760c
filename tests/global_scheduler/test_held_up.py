"""A scheduler that was held up itself (stopped, its machine paused) has not read yet what others said."""

import asyncio
from typing import cast

import pytest

from prism.common.bus import Bus
from prism.common.messages.load import LoadReport
from prism.global_scheduler import scheduler as module
from prism.global_scheduler.cluster import WORKER_SILENT_S
from prism.global_scheduler.election import Election
from prism.global_scheduler.routes import DeadRoutes
from prism.global_scheduler.scheduler import HELD_UP_S, TICK_S, Deadlines, GlobalScheduler
from prism.scheduling.placement import policy_named

pytestmark = pytest.mark.core


class Standby:
    """Stands in for an election that somebody else has won."""

    leading = False


class NoRoutes:
    """Stands in for routes: nobody has any."""

    def find(self, workers: set[str], now: float) -> list[str]:
        return []


class Clock:
    """Seconds, as the test says."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


async def look(scheduler: GlobalScheduler) -> set[str]:
    """The workers that are left after a look."""
    await scheduler._step(cast(Election, Standby()), cast(DeadRoutes, NoRoutes()))
    return set(scheduler.cluster.workers)


async def made(clock: Clock, tasks: asyncio.TaskGroup) -> GlobalScheduler:
    """A scheduler that has just heard a worker, and looked."""
    scheduler = GlobalScheduler(cast(Bus, None), tasks, policy_named("lru"), "lru", Deadlines())
    report = LoadReport("w", "node", "cpu", [0], 10, 0, [])
    scheduler.cluster.load(report, clock.now)
    assert await look(scheduler) == {"w"}
    return scheduler


async def test_a_worker_that_says_nothing_is_gone(clock: Clock) -> None:
    async with asyncio.TaskGroup() as tasks:
        scheduler = await made(clock, tasks)
        left = {"w"}
        heard_at = clock.now
        while left and clock.now < heard_at + 10:
            clock.now += TICK_S
            left = await look(scheduler)
        assert not left
        assert clock.now - heard_at <= WORKER_SILENT_S + TICK_S


async def test_nobody_is_gone_by_a_look_that_comes_late(clock: Clock) -> None:
    async with asyncio.TaskGroup() as tasks:
        scheduler = await made(clock, tasks)
        clock.now += TICK_S + HELD_UP_S + 5.0
        assert await look(scheduler) == {"w"}
        clock.now += 0.1
        assert not await look(scheduler), "by then its reports would have been read"


async def test_who_is_late_at_every_look_notices_all_the_same(clock: Clock) -> None:
    async with asyncio.TaskGroup() as tasks:
        scheduler = await made(clock, tasks)
        clock.now += TICK_S + HELD_UP_S + 5.0
        assert await look(scheduler) == {"w"}
        clock.now += TICK_S + HELD_UP_S + 5.0
        assert not await look(scheduler)
