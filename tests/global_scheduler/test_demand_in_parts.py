"""A gateway's demand that takes several messages counts as one report."""

import asyncio
from typing import TYPE_CHECKING

import pytest

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.demand_parts import split
from prism.common.messages.explain import PlanReport
from prism.common.messages.load import DemandReport, ModelDemand

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import SchedulerFactory

pytestmark = pytest.mark.core


async def test_no_part_takes_the_place_of_another(bus: Bus, scheduler: "SchedulerFactory") -> None:
    names = {f"model-{number}" for number in range(100)}
    parts = split(DemandReport("g", [ModelDemand(name, 1) for name in sorted(names)]), 1000)
    assert len(parts) > 2
    async with scheduler():
        for part in parts:
            await bus.publish(subjects.demand("g"), part)
        known: set[str] = set()
        async with asyncio.timeout(10):
            while known != names:
                plan = await bus.request(subjects.scheduler_plan(), None, PlanReport, timeout_s=5)
                known = {demand.model for demand in plan.demand}
