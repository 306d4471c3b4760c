"""Leadership: one at a time, fenced by epochs, handed over at once or after the lease has run out."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import pytest
from nats.aio.msg import Msg

from prism.cli.nats_server import NatsServer, nats_server
from prism.common import subjects
from prism.common.bus import LEADER_TTL_S, Bus, connect_bus
from prism.common.messages.codec import encode
from prism.common.messages.explain import PlanReport
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind, LeaderRecord
from prism.global_scheduler.election import MARGIN_S, POLL_S, RENEW_S, Election, stand_for_election

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import Register, SchedulerFactory, ScriptedGateway, WorkerFactory

pytestmark = pytest.mark.core

TAKE_OVER_S = 3.0
SERVER_SWEEP_S = 0.4
"""How much later than its time an entry of a bucket expires, at most (measured)."""
DEADLINE_S = 20.0
ACTIVATE, DOZE = CommandKind.ACTIVATE, CommandKind.DOZE


class Epochs:
    """The epochs that candidates came to lead in, 0 for each time one stopped."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._awaited = 0
        self._changed = asyncio.Event()

    def __call__(self, epoch: int) -> None:
        self.seen.append(epoch)
        self._changed.set()

    async def next(self, deadline_s: float = 10.0) -> int:
        """The first change that was not awaited yet."""
        async with asyncio.timeout(deadline_s):
            while len(self.seen) == self._awaited:
                self._changed.clear()
                await self._changed.wait()
        self._awaited += 1
        return self.seen[self._awaited - 1]


async def test_one_of_two_leads_and_the_other_takes_over_at_once_when_it_ends(bus: Bus) -> None:
    epochs = Epochs()
    async with stand_for_election(bus, "two", epochs) as two:
        first = await epochs.next()
        async with stand_for_election(bus, "one", epochs) as one:
            assert (two.leading, one.leading) == (True, False)
            await two.release()
            began = monotonic()
            assert await epochs.next() == 0
            assert await epochs.next() > first
            assert monotonic() - began < LEADER_TTL_S, "a lease given back need not run out"
            assert one.leading != two.leading


def test_a_standby_takes_over_within_three_seconds_and_never_beside_a_leader() -> None:
    assert LEADER_TTL_S + SERVER_SWEEP_S + POLL_S <= TAKE_OVER_S
    assert RENEW_S < LEADER_TTL_S - MARGIN_S, "a leader renews before it must step down"
    assert MARGIN_S > 0, "it steps down before its lease ends"


async def test_a_leader_that_vanishes_is_replaced_when_its_lease_runs_out(bus: Bus) -> None:
    bucket = await bus.bucket(subjects.BUCKET_LEADER)
    began = monotonic()
    revision = await bucket.create(subjects.LEADER_KEY, encode(LeaderRecord("vanished")))
    epochs = Epochs()
    async with stand_for_election(bus, "one", epochs) as one:
        assert await epochs.next() > revision
        assert monotonic() - began > LEADER_TTL_S - 0.5
        assert one.leader == "one"


async def test_a_leader_whose_lease_another_has_steps_down(bus: Bus) -> None:
    epochs = Epochs()
    async with stand_for_election(bus, "one", epochs) as one:
        await epochs.next()
        bucket = await bus.bucket(subjects.BUCKET_LEADER)
        await bucket.put(subjects.LEADER_KEY, encode(LeaderRecord("usurper")))
        assert await epochs.next(LEADER_TTL_S) == 0
        assert not one.leading
        assert one.leader == "usurper"


async def test_a_renewal_whose_answer_was_lost_does_not_cost_the_lease(bus: Bus) -> None:
    epochs = Epochs()
    async with stand_for_election(bus, "one", epochs) as one:
        epoch = await epochs.next()
        bucket = await bus.bucket(subjects.BUCKET_LEADER)
        revision = await bucket.put(subjects.LEADER_KEY, encode(LeaderRecord("one")))
        watcher = await bucket.watch(subjects.LEADER_KEY)
        async with asyncio.timeout(5):
            async for entry in watcher:
                if entry is not None and entry.revision > revision:
                    break
        await watcher.stop()
        assert one.leading
        assert one.epoch == epoch


async def test_without_the_server_a_leader_steps_down_before_its_lease_ends_and_leads_again_later(
    tmp_path: Path,
) -> None:
    with nats_server(tmp_path / "nats") as server:
        port = int(server.url.rsplit(":", 1)[1])
        async with connect_bus(server.url, name="one") as bus:
            epochs = Epochs()
            async with stand_for_election(bus, "one", epochs) as one:
                first = await epochs.next()
                server.stop()
                assert await epochs.next() == 0
                assert not one.leading
                with nats_server(tmp_path / "nats", port=port):
                    assert await epochs.next(15) > first


async def test_renouncing_lets_another_lead(bus: Bus) -> None:
    epochs = Epochs()
    async with stand_for_election(bus, "one", epochs) as one:
        epoch = await epochs.next()
        one.renounce(epoch - 1, "old news")
        assert one.leading, "a refusal of an epoch that is over changes nothing"
        one.renounce(epoch, "a worker has seen a newer epoch")
        assert await epochs.next() == 0
        assert not one.leading
        assert await epochs.next() > epoch


async def test_an_epoch_is_above_those_of_workers_even_when_revisions_begin_anew(bus: Bus) -> None:
    epochs = Epochs()
    async with stand_for_election(bus, "one", epochs, lambda: 500):
        assert await epochs.next() == 501


async def test_a_candidate_that_never_led_releases_nothing(bus: Bus) -> None:
    bucket = await bus.bucket(subjects.BUCKET_LEADER)
    await bucket.create(subjects.LEADER_KEY, encode(LeaderRecord("other")))
    await Election(bus, "one", lambda epoch: None, lambda: 0).release()
    assert (await bucket.get(subjects.LEADER_KEY)).value == encode(LeaderRecord("other"))


async def test_of_two_schedulers_only_one_commands_and_the_other_takes_over_where_it_was(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    for name in ("a", "b", "c"):
        await register_model(name, 60)
    async with scripted_worker() as worker, scheduler("standby-to-be") as standby:
        async with scheduler("other"):
            await gateway.park("a")
            await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
            await gateway.park("b")
            await worker.until(lambda: worker.states.get("b") is ModelState.ACTIVE)
            reports = [
                await bus.request(subjects.scheduler_plan(name), None, PlanReport, timeout_s=5)
                for name in ("standby-to-be", "other")
            ]
            assert sorted(bool(report.epoch) for report in reports) == [False, True]
            assert len({report.leader for report in reports}) == 1
            assert len({command.epoch for command in worker.commands}) == 1
        await gateway.park("c")
        await worker.until(lambda: worker.states.get("c") is ModelState.ACTIVE)
        expected = [(ACTIVATE, "a"), (DOZE, "a"), (ACTIVATE, "b"), (DOZE, "b"), (ACTIVATE, "c")]
        assert worker.kinds() == expected, "nothing twice, nothing forgotten"
        assert standby.explain().epoch == worker.epoch


async def test_a_refused_epoch_makes_the_leader_step_down_and_come_back_with_a_newer_one(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    led: asyncio.Queue[str] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        led.put_nowait(message.subject)

    await bus.subscribe(subjects.event("leader", ""), hear)
    await bus.flush()
    await register_model("a", 60)
    async with scripted_worker() as worker, scheduler() as running:
        await asyncio.wait_for(led.get(), 10)
        worker.epoch = running.explain().epoch + 1
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        assert [command.epoch for command in worker.commands] == [worker.epoch]
        assert running.explain().epoch == worker.epoch > 1


async def test_after_kill_9_the_standby_takes_over_and_nothing_is_lost(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    fresh_nats: NatsServer,
) -> None:
    for name in ("a", "b"):
        await register_model(name, 60)
    command = [sys.executable, "-m", "prism.global_scheduler", "--nats", fresh_nats.url]
    async with scripted_worker() as worker:
        process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
        try:
            await gateway.park("a")
            await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
            first_epoch = worker.epoch
            async with scheduler("standby"):
                process.send_signal(signal.SIGKILL)
                await process.wait()
                await gateway.park("b")
                await worker.until(lambda: worker.epoch > first_epoch, DEADLINE_S)
                await worker.until(lambda: worker.states.get("b") is ModelState.ACTIVE)
                assert worker.kinds() == [(ACTIVATE, "a"), (DOZE, "a"), (ACTIVATE, "b")]
        finally:
            if process.returncode is None:
                os.kill(process.pid, signal.SIGKILL)
                await process.wait()
