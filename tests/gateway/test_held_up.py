"""A gateway that stood still heard nobody meanwhile: that says nothing of the workers."""

import asyncio
import os
import re
import signal
import sys
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from tests.gateway.conftest import Stage
from tests.gateway.reading import joined, live_events, read_events
from tests.gateway.scripted_worker import ScriptedWorker, Turn

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.generation import SamplingParams, TokenFrame
from prism.common.messages.load import LoadReport
from prism.gateway.dispatch import Dispatcher, Job
from prism.gateway.fleet import Fleet
from prism.gateway.replies import Inbox
from prism.gateway.settings import Settings
from prism.gateway.silence_watch import HELD_UP_S, SilenceWatch

pytestmark = pytest.mark.core

INTERVAL_S = 0.25
SILENCE_S = 2.5


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A fleet, looked at on a clock of the test's own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.fleet = Fleet(self.clock, SILENCE_S, lambda: None)
        self.watch = SilenceWatch(self.fleet, self.clock, INTERVAL_S)

    def report(self, *workers: str) -> None:
        for worker in workers:
            self.fleet.on_load(LoadReport(worker, "node", "simulated", [0], 1, 0, []))

    def look_after(self, seconds: float, *, connected: bool = True) -> list[str]:
        self.clock.now += seconds
        return self.watch.look(connected=connected)

    def looks_until_gone(self, worker: str) -> int:
        """Looks in time, in which nobody reports, until `worker` is gone."""
        for count in range(1, 100):
            if worker in self.look_after(INTERVAL_S):
                return count
        raise AssertionError(f"{worker} is never given up")


PATIENCE = int(SILENCE_S / INTERVAL_S) + 1
"""Looks until a worker that no longer reports is given up."""


def test_a_silent_worker_is_named_and_the_others_are_not() -> None:
    watched = Watched()
    watched.report("dead", "alive")
    for _ in range(PATIENCE - 1):
        assert watched.look_after(INTERVAL_S) == []
        watched.report("alive")
    assert watched.look_after(INTERVAL_S) == ["dead"]


def test_a_look_that_comes_late_gives_up_nobody_and_what_waits_is_read_first() -> None:
    watched = Watched()
    watched.report("worker")
    assert watched.look_after(60.0) == []
    watched.report("worker")
    assert watched.look_after(INTERVAL_S) == []


def test_a_worker_that_died_meanwhile_is_given_up_as_much_later() -> None:
    watched = Watched()
    watched.report("dead")
    watched.look_after(60.0)
    assert watched.looks_until_gone("dead") == PATIENCE


def test_a_look_a_little_late_is_one_like_any_other() -> None:
    watched = Watched()
    watched.report("dead")
    late_s = INTERVAL_S + HELD_UP_S - 0.01
    assert watched.look_after(late_s) == []
    assert watched.look_after(late_s) == []
    assert watched.look_after(late_s) == ["dead"]


def test_without_the_bus_nobody_is_heard_and_nobody_given_up() -> None:
    watched = Watched()
    watched.report("worker")
    for _ in range(3 * PATIENCE):
        assert watched.look_after(INTERVAL_S, connected=False) == []
    assert watched.looks_until_gone("worker") == PATIENCE


class LateInbox:
    """Says that nothing came, so many seconds after it should have said so; then it has a frame."""

    worker = "worker-1"

    def __init__(self, clock: Clock, *late_s: float) -> None:
        self._clock = clock
        self._late_s = list(late_s)
        self.stats = {"reconnects": 0}

    async def get(self, until: float) -> list[TokenFrame]:
        if not self._late_s:
            return [TokenFrame("rid", 0)]
        self._clock.now = until + self._late_s.pop(0)
        raise TimeoutError


class InboxOverAReturn(LateInbox):
    """The bus comes back during the first wait, in which nothing came."""

    def __init__(self, clock: Clock, *late_s: float) -> None:
        super().__init__(clock, *late_s)
        self._back = False

    async def get(self, until: float) -> list[TokenFrame]:
        self.stats["reconnects"] += not self._back
        self._back = True
        return await super().get(until)


async def frames_from(inbox: LateInbox, clock: Clock, deadline_s: float = 1000.0) -> list[TokenFrame]:
    bus = SimpleNamespace(client=SimpleNamespace(is_connected=True, stats=inbox.stats))
    parts: dict[str, Any] = dict.fromkeys(("registry", "parking", "replies", "metrics"))
    fleet = Fleet(clock, SILENCE_S, lambda: None)
    dispatcher = Dispatcher(cast(Bus, bus), "gateway-1", Settings(), fleet=fleet, clock=clock, **parts)
    job = Job("m", [1], SamplingParams(max_new_tokens=1), clock.now + deadline_s)
    return await dispatcher._next_frames(cast(Inbox, inbox), job, accepted=True, begun=True)


async def test_a_stream_is_not_stalled_by_the_time_that_the_gateway_stood_still() -> None:
    clock = Clock()
    assert await frames_from(LateInbox(clock, 60.0), clock) == [TokenFrame("rid", 0)]


@pytest.mark.parametrize("late_s", [(0.0,), (HELD_UP_S / 2,), (60.0, 0.0)])
async def test_a_stream_that_is_silent_while_the_gateway_looks_is_stalled(late_s: tuple[float, ...]) -> None:
    clock = Clock()
    with pytest.raises(PrismError, match="sent nothing") as caught:
        await frames_from(LateInbox(clock, *late_s), clock)
    assert caught.value.code is ErrorCode.ENGINE_LOST


async def test_a_wait_that_began_before_the_bus_came_back_says_nothing_of_the_worker() -> None:
    clock = Clock()
    assert await frames_from(InboxOverAReturn(clock, 0.0), clock) == [TokenFrame("rid", 0)]
    with pytest.raises(PrismError, match="sent nothing"):
        await frames_from(InboxOverAReturn(clock, 0.0, 0.0), clock)


async def test_a_deadline_that_passed_while_the_gateway_stood_still_has_passed() -> None:
    clock = Clock()
    with pytest.raises(PrismError) as caught:
        await frames_from(LateInbox(clock, 60.0), clock, deadline_s=1.0)
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED


async def test_a_gateway_that_was_stopped_goes_on_with_its_streams(
    stage: Stage, fresh_nats: NatsServer
) -> None:
    await stage.register("m")
    go_on, said = asyncio.Event(), asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids("one "))
        await go_on.wait()
        await turn.send(stage.ids("two"), finish="stop")
        await stage.bus.flush()
        said.set()

    worker = await stage.worker(script, "m")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.gateway", "--port", "0", "--nats", fresh_nats.url),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PRISM_GATEWAY_SILENCE_S": "1.5"},
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        found = re.fullmatch(r"gateway ready at (\S+)\n", line)
        assert found is not None, line
        body = {"model": "m", "prompt": "hello", "stream": True}
        async with (
            httpx.AsyncClient(base_url=found[1], timeout=20) as http,
            http.stream("POST", "/v1/completions", json=body) as response,
        ):
            events = live_events(response)
            first = await anext(events)
            process.send_signal(signal.SIGSTOP)
            await reports_of(worker, stage.bus, 30)
            go_on.set()
            await said.wait()
            process.send_signal(signal.SIGCONT)
            told = [first, *[event async for event in events]]
        assert joined(read_events("".join(f"data: {event}\n\n" for event in told))) == "one two"
        assert (worker.turns.qsize(), worker.cancels.qsize()) == (1, 0)
    finally:
        process.kill()
        await process.wait()


async def reports_of(worker: ScriptedWorker, bus: Bus, count: int) -> None:
    """Wait until `worker` has reported `count` times more: a tenth of a second each."""
    heard = asyncio.Semaphore(0)

    async def hear(message: object) -> None:
        heard.release()

    subscription = await bus.subscribe(subjects.load(worker.name), hear, inline=True)
    for _ in range(count):
        await heard.acquire()
    await subscription.unsubscribe()
