"""The scheduler says on the bus why models are where they are; a standby asks the leader."""

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

import pytest

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode
from prism.common.messages.explain import ExplainReply, ExplainRequest
from prism.common.messages.models import ModelState
from prism.scheduling.placement import BalancedPlacement

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import Register, SchedulerFactory, ScriptedGateway, WorkerFactory

pytestmark = pytest.mark.core


async def asked(bus: Bus, model: str = "", instance: str = "") -> ExplainReply:
    subject = subjects.scheduler_explain(instance)
    return await bus.request(subject, ExplainRequest(model), ExplainReply, timeout_s=5)


async def test_why_a_model_is_where_it_is_and_what_was_decided(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
) -> None:
    for name in ("a", "b"):
        await register_model(name, 60)
    async with scripted_worker() as worker, scheduler("one", policy=BalancedPlacement()):
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.ACTIVE)
        await gateway.park()
        async with scheduler("two", policy=BalancedPlacement()) as standby:
            deadline = monotonic() + 10
            while standby.explain().leader != "one":
                assert monotonic() < deadline
                await asyncio.sleep(0.01)
            for instance in ("", "one"):
                reply = await asked(bus, "a", instance)
                (found,) = reply.models
                assert reply.instance == "one", "the leader answers, whoever is asked"
                assert found.summary == "active on worker-1"
                assert [place.verdict for place in found.places] == ["here"]
                assert [action.reason for action in found.decided] == ["1 requests parked"]
            brief = await asked(bus)
            assert {one.model: one.summary for one in brief.models} == {
                "a": "active on worker-1",
                "b": "on no GPU",
            }
            unknown = await asked(bus, "nobody")
            assert unknown.error is not None
            assert unknown.error.code is ErrorCode.MODEL_NOT_FOUND
