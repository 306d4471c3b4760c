"""A model moves between two workers because one is under pressure: on a real bus, with scripted workers."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from nats.aio.msg import Msg

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.codec import decode
from prism.common.messages.events import Event
from prism.common.messages.models import InitialPlacement, ModelState
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement import BalancedPlacement

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import (
        Register,
        SchedulerFactory,
        ScriptedGateway,
        ScriptedWorker,
        WorkerFactory,
    )

pytestmark = pytest.mark.core

ACTIVATE, DOZE = CommandKind.ACTIVATE, CommandKind.DOZE
MOVE_S = 20.0
TAKE_OVER_DEADLINE_S = 20.0


@asynccontextmanager
async def two_workers(
    scripted_worker: "WorkerFactory", register_model: "Register"
) -> AsyncIterator[tuple["ScriptedWorker", "ScriptedWorker"]]:
    """Two models at home on the first of two workers, which prefill 100 tokens a second."""
    for name in ("a", "b"):
        await register_model(name, 60, init_placements=[InitialPlacement([0])])
    async with (
        scripted_worker("worker-1", 200) as first,
        scripted_worker("worker-2", 200, gpu_id=1) as second,
    ):
        first.prefill_tokens_per_s = second.prefill_tokens_per_s = 100.0
        yield first, second


async def press(gateway: "ScriptedGateway", first: "ScriptedWorker") -> None:
    """Have both models be active on the first worker, and more prompts come than it can well prefill."""
    await first.until(lambda: all(first.states.get(name) is ModelState.ACTIVE for name in ("a", "b")))
    gateway.came = dict.fromkeys(("a", "b"), (60, 60 * 10))
    await gateway.report()


async def test_the_source_serves_until_the_target_does_and_both_are_told(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    events: asyncio.Queue[Event] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        event = decode(message.data, Event)
        if event.kind in ("moving", "moved"):
            events.put_nowait(event)

    await bus.subscribe(subjects.events(), hear)
    async with (
        two_workers(scripted_worker, register_model) as (first, second),
        scheduler(policy=BalancedPlacement()),
    ):
        second.go_on.clear()
        await press(gateway, first)
        await second.until(lambda: len(second.commands) == 1, MOVE_S)
        moved = second.commands[0].spec.model_name
        assert first.kinds() == [(ACTIVATE, "a"), (ACTIVATE, "b")], "the source goes on meanwhile"
        second.go_on.set()
        await first.until(lambda: first.states[moved] is ModelState.DOZING)
        assert second.states[moved] is ModelState.ACTIVE
        told = [await asyncio.wait_for(events.get(), 10) for _ in range(2)]
        assert [(event.kind, event.model, event.worker) for event in told] == [
            ("moving", moved, "worker-2"),
            ("moved", moved, "worker-2"),
        ]
        assert told[0].detail == "from worker-1"
    assert first.kinds()[2:] == [(DOZE, moved)]
    assert second.kinds() == [(ACTIVATE, moved)]


async def test_a_leader_killed_in_the_middle_of_a_move_leaves_a_move_that_its_successor_ends(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    fresh_nats: NatsServer,
) -> None:
    command = [sys.executable, "-m", "prism.global_scheduler", "--nats", fresh_nats.url]
    async with two_workers(scripted_worker, register_model) as (first, second):
        process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
        try:
            second.go_on.clear()
            await first.until(lambda: first.states.get("b") is ModelState.ACTIVE)
            async with scheduler("standby", policy=BalancedPlacement()) as standby:
                await press(gateway, first)
                await second.until(lambda: ModelState.STARTING in second.states.values(), MOVE_S)
                moved = second.commands[0].spec.model_name
                process.send_signal(signal.SIGKILL)
                await process.wait()
                async with asyncio.timeout(TAKE_OVER_DEADLINE_S):
                    while not standby.explain().epoch:
                        await first.until(lambda: True)
                        await asyncio.sleep(0.01)
                second.go_on.set()
                await first.until(lambda: first.states[moved] is ModelState.DOZING, MOVE_S)
                stays = ({"a", "b"} - {moved}).pop()
                assert first.states[stays] is ModelState.ACTIVE
                assert second.states == {moved: ModelState.ACTIVE}
                assert second.kinds() == [(ACTIVATE, moved)], "what was under way is not done again"
                assert first.kinds()[2:] == [(DOZE, moved)]
                assert first.epoch > second.epoch, "the successor ended it"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                await process.wait()
