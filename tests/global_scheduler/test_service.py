"""The global scheduler against a real NATS server: what it commands, when, and how often."""

import asyncio
from typing import TYPE_CHECKING

import pytest
from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.codec import decode, encode
from prism.common.messages.events import Event
from prism.common.messages.explain import PlanReport
from prism.common.messages.models import InitialPlacement, ModelSpec, ModelState
from prism.common.messages.placement import CommandKind, Route

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import Register, SchedulerFactory, ScriptedGateway, WorkerFactory

pytestmark = pytest.mark.core

ACTIVATE, DOZE, RELEASE = CommandKind.ACTIVATE, CommandKind.DOZE, CommandKind.RELEASE


async def explained(bus: Bus, instance: str = "") -> PlanReport:
    return await bus.request(subjects.scheduler_plan(instance), None, PlanReport, timeout_s=5)


async def test_demand_wakes_a_model_exactly_once_however_often_it_is_reported(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    await register_model("a", 60)
    async with scripted_worker() as worker, scheduler():
        worker.go_on.clear()
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.STARTING)
        for _ in range(200):
            await gateway.report()
        worker.go_on.set()
        await worker.until(lambda: worker.states["a"] is ModelState.ACTIVE)
        for _ in range(50):
            await gateway.report()
            await worker.report()
        await gateway.park()
        await register_model("b", 40)
        await gateway.park("b")
        await worker.until(lambda: worker.states.get("b") is ModelState.ACTIVE)
        assert worker.kinds() == [(ACTIVATE, "a"), (ACTIVATE, "b")]
        first = worker.commands[0]
        assert (first.kv_bytes, first.facts.parameters, first.epoch) == (10, 50, worker.epoch)


async def test_a_full_worker_puts_an_idle_model_to_sleep_before_it_wakes_another(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    for name in ("a", "b"):
        await register_model(name, 60)
    async with scripted_worker() as worker, scheduler():
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        await gateway.park("b")
        await worker.until(lambda: worker.states.get("b") is ModelState.ACTIVE)
        assert worker.kinds() == [(ACTIVATE, "a"), (DOZE, "a"), (ACTIVATE, "b")]
        await gateway.park("a")
        await worker.until(lambda: worker.states["a"] is ModelState.ACTIVE)
        assert worker.kinds()[3:] == [(DOZE, "b"), (ACTIVATE, "a")]
        assert not worker.overlap


async def test_models_that_are_on_come_up_by_themselves_once_their_facts_are_known(
    scheduler: "SchedulerFactory", scripted_worker: "WorkerFactory", register_model: "Register", bus: Bus
) -> None:
    on, off = [InitialPlacement([0])], [InitialPlacement([0], on=False)]
    specs = [ModelSpec("a", "/a", init_placements=on), ModelSpec("b", "/b", init_placements=off)]
    async with scripted_worker() as worker, scheduler(specs=specs):
        await register_model("b", 20, init_placements=off)
        assert not worker.commands
        await register_model("a", 60, init_placements=on)
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        assert worker.kinds() == [(ACTIVATE, "a")]


async def test_a_failure_is_told_and_tried_again_after_a_while(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    events: asyncio.Queue[Event] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        events.put_nowait(decode(message.data, Event))

    await bus.subscribe(subjects.event("failed", "a"), hear)
    await register_model("a", 60)
    async with scripted_worker() as worker, scheduler():
        worker.fail_next["a"] = "the engine said no"
        began = asyncio.get_running_loop().time()
        await gateway.park("a")
        event = await asyncio.wait_for(events.get(), 10)
        assert (event.model, event.worker, event.detail) == ("a", "worker-1", "the engine said no")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        assert worker.kinds() == [(ACTIVATE, "a"), (ACTIVATE, "a")]
        assert asyncio.get_running_loop().time() - began >= 1.0


async def test_a_model_taken_out_of_the_registry_is_released(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    await register_model("a", 60)
    async with scripted_worker() as worker, scheduler():
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        bucket = await bus.bucket(subjects.BUCKET_MODELS)
        await bucket.delete(subjects.spec_key("a"))
        await worker.until(lambda: worker.states["a"] is ModelState.COLD)
        assert worker.kinds() == [(ACTIVATE, "a"), (RELEASE, "a")]


async def test_a_model_whose_files_change_leaves_and_comes_up_anew_when_asked_for(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    await register_model("a", 60, version="1")
    async with scripted_worker() as worker, scheduler():
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        await gateway.park()
        await register_model("a", 60, version="1", priority=1)
        await register_model("a", 70, version="2")
        await worker.until(lambda: worker.states["a"] is ModelState.COLD)
        release = worker.commands[-1]
        assert (release.kind, release.facts.version, release.drain_s) == (RELEASE, "2", 60.0)
        await gateway.park("a")
        await worker.until(lambda: worker.states["a"] is ModelState.ACTIVE)
        assert worker.kinds() == [(ACTIVATE, "a"), (RELEASE, "a"), (ACTIVATE, "a")]
        assert worker.ledger.held("a").weights == 60


async def test_a_model_that_sleeps_while_its_files_change_is_not_woken(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    for name in ("a", "b"):
        await register_model(name, 60, version="1")
    async with scripted_worker() as worker, scheduler():
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        await gateway.park("b")
        await worker.until(lambda: worker.states.get("b") is ModelState.ACTIVE)
        assert worker.states["a"] is ModelState.DOZING
        await gateway.park()
        await register_model("a", 60, version="2")
        await worker.until(lambda: worker.states["a"] is ModelState.COLD)
        assert worker.kinds()[-1] == (RELEASE, "a")
        assert worker.states["b"] is ModelState.ACTIVE


async def test_a_lost_answer_is_made_up_for_by_reports(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    for name in ("a", "b"):
        await register_model(name, 60)
    async with scripted_worker() as worker, scheduler():
        worker.answers = False
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        await gateway.park("b")
        await worker.until(lambda: worker.states.get("b") is ModelState.ACTIVE)
        assert worker.kinds() == [(ACTIVATE, "a"), (DOZE, "a"), (ACTIVATE, "b")]


async def test_a_model_whose_failure_got_lost_is_asked_for_again_within_seconds(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    await register_model("a", 60)
    async with scripted_worker() as worker, scheduler():
        worker.answers = False
        worker.fail_next["a"] = "the engine said no"
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        assert worker.kinds() == [(ACTIVATE, "a"), (ACTIVATE, "a")]


async def test_a_command_that_got_lost_is_given_again_within_seconds(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    for name in ("a", "b"):
        await register_model(name, 60)
    async with scripted_worker() as worker, scheduler():
        worker.lose_next = {ACTIVATE, DOZE}
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        assert worker.lost == [ACTIVATE]
        await gateway.park("b")
        await worker.until(lambda: worker.states.get("b") is ModelState.ACTIVE)
        assert worker.lost == [ACTIVATE, DOZE]
        assert worker.kinds() == [(ACTIVATE, "a"), (DOZE, "a"), (ACTIVATE, "b")]


async def test_a_silent_worker_is_replaced_and_its_routes_are_taken_down(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    await register_model("a", 60)
    routes = await bus.bucket(subjects.BUCKET_ROUTES)
    gone = asyncio.Event()
    async with scripted_worker("worker-1") as first, scheduler():
        await gateway.park("a")
        await first.until(lambda: first.states.get("a") is ModelState.ACTIVE)
        await gateway.park()
        await routes.put(subjects.route_key("a", "worker-1"), encode(Route("a", "worker-1", "node")))
        watcher = await routes.watch(">")

        async def follow() -> None:
            async for entry in watcher:
                if entry is not None and entry.operation is not None:
                    gone.set()

        following = asyncio.create_task(follow())
        async with scripted_worker("worker-2") as second:
            first.reports = False
            await gateway.park("a")
            await second.until(lambda: second.states.get("a") is ModelState.ACTIVE)
            assert second.kinds() == [(ACTIVATE, "a")]
            assert first.kinds() == [(ACTIVATE, "a")]
            await asyncio.wait_for(gone.wait(), 10)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await watcher.stop()


async def test_it_explains_itself(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    await register_model("a", 60)
    await register_model("huge", 1_000_000_000)
    async with scripted_worker() as worker, scheduler("scheduler-1"):
        await gateway.park("a", "huge")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        report = await explained(bus)
        assert (report.instance, report.leader, report.policy) == ("scheduler-1", "scheduler-1", "lru")
        assert report.epoch == worker.epoch > 0
        assert report.models == 2
        assert [(action.kind, action.model, action.reason) for action in report.actions] == [
            (ACTIVATE, "a", "1 requests parked")
        ]
        assert [note.model for note in report.notes] == ["huge"]
        assert "1.000 GB" in report.notes[0].text
        assert report.workers[0].memory_limit_bytes == 100
        assert {demand.model for demand in report.demand} == {"a", "huge"}


async def test_it_shows_as_a_micro_service(scheduler: "SchedulerFactory", bus: Bus) -> None:
    async with scheduler("scheduler-1"):
        answer = await bus.client.request("$SRV.INFO.prism-global-scheduler", b"", timeout=5)
        assert b'"scheduler-1"' in answer.data
        assert b"prism.v1.scheduler.plan" in answer.data
