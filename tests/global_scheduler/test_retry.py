"""Taking up a failed model again: the store looks anew, the worker lets go, the backoff is forgotten."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode
from prism.common.messages.codec import decode, encode
from prism.common.messages.explain import PlanReport
from prism.common.messages.models import ModelFacts, ModelState
from prism.common.messages.placement import CommandKind
from prism.common.messages.retry import RetryOutcome, RetryRequest
from prism.common.messages.store import StoreInspection, StoreModelRequest

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import Register, SchedulerFactory, ScriptedGateway, WorkerFactory

pytestmark = pytest.mark.core

ACTIVATE, RELEASE = CommandKind.ACTIVATE, CommandKind.RELEASE
GOOD = ModelFacts("a", parameters=50, kv_elements_per_token=1, context_length=5)


@asynccontextmanager
async def store_that_finds(bus: Bus, facts: ModelFacts) -> AsyncIterator[None]:
    """A test double of the node's model store, which finds `facts`."""

    async def on_inspect(message: Msg) -> None:
        assert decode(message.data, StoreModelRequest).model == facts.model
        await message.respond(encode(StoreInspection(facts)))

    subscription = await bus.subscribe(subjects.store("node", "inspect"), on_inspect)
    await bus.flush()
    yield
    await subscription.unsubscribe()


async def retry(bus: Bus, model: str = "a", workers: int = 1) -> RetryOutcome:
    """What comes of a retry, once a scheduler leads that has heard of so many workers."""
    async with asyncio.timeout(10):
        while True:
            plan = await bus.request(subjects.scheduler_plan(), None, PlanReport, timeout_s=5)
            if plan.epoch and len(plan.workers) == workers and plan.models:
                break
    return await bus.request(subjects.scheduler_retry(), RetryRequest(model, 5), RetryOutcome, timeout_s=10)


async def test_a_retry_clears_the_failure_everywhere_so_that_demand_starts_the_model_at_once(
    bus: Bus,
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
) -> None:
    await register_model("a")
    async with scripted_worker() as worker, scheduler("scheduler-1") as leader, scheduler("scheduler-2"):
        worker.fail_next["a"] = "its weights are cut off"
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.FAILED)
        await gateway.park()
        # As after many failures in a row: far beyond this test's patience.
        async with asyncio.timeout(5):
            while not leader.cluster.backoff.failures():
                await bus.flush()
        for _ in range(10):
            leader.cluster.backoff.failed("worker-1", "a", "its weights are cut off", 1e9)
        async with store_that_finds(bus, GOOD):
            outcome = await retry(bus)
        assert (outcome.state, outcome.error, outcome.facts) == (ModelState.COLD, None, GOOD)
        assert outcome.workers == {"worker-1": ModelState.COLD}
        assert worker.kinds() == [(ACTIVATE, "a"), (RELEASE, "a")]
        assert leader.cluster.backoff.failures() == ()
        await gateway.park("a")
        await worker.until(lambda: worker.states["a"] is ModelState.ACTIVE)


async def test_a_model_that_is_still_broken_stays_failed_and_says_why(
    bus: Bus, scheduler: "SchedulerFactory", scripted_worker: "WorkerFactory", register_model: "Register"
) -> None:
    await register_model("a")
    async with scripted_worker() as worker, scheduler():
        await worker.set_state("a", ModelState.FAILED)
        async with store_that_finds(bus, ModelFacts("a", error="model.safetensors is cut off")):
            outcome = await retry(bus)
        assert outcome.state is ModelState.FAILED
        assert outcome.error is not None
        assert outcome.error.message == "model.safetensors is cut off"
        assert worker.kinds() == []


async def test_what_cannot_be_retried_is_said(
    bus: Bus, scheduler: "SchedulerFactory", scripted_worker: "WorkerFactory", register_model: "Register"
) -> None:
    await register_model("a")
    async with scheduler():
        unknown = await retry(bus, "b", workers=0)
        assert unknown.error is not None
        assert unknown.error.code is ErrorCode.MODEL_NOT_FOUND
        nobody = await retry(bus, workers=0)
        assert nobody.error is not None
        assert "no worker reports" in nobody.error.message
        async with scripted_worker():
            storeless = await retry(bus)
        assert storeless.error is not None
        assert storeless.error.code is ErrorCode.STORE_UNAVAILABLE
        assert "the model store of node" in storeless.error.message
