"""The micro service that shows the scheduler on the bus, and answers why things are as they are."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from nats.micro.request import Request

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.codec import encode
from prism.common.messages.explain import PlanReport
from prism.common.micro import EndpointHandler, micro_service
from prism.global_scheduler.election import Election
from prism.global_scheduler.scheduler import GlobalScheduler

log = logging.getLogger(__name__)

FORWARD_DEADLINE_S = 2.0


@asynccontextmanager
async def explain_service(
    bus: Bus,
    scheduler: GlobalScheduler,
    election: Election,
    others: Mapping[str, tuple[str, EndpointHandler]],
) -> AsyncIterator[None]:
    """Answer `PlanReport`s: the leader's on the common subject, whoever is asked, and each one's own.
    `others` are further endpoints of the service."""

    async def own(request: Request) -> None:
        await request.respond(encode(scheduler.explain()))

    async def leaders(request: Request) -> None:
        report = scheduler.explain()
        if report.leader not in ("", election.instance):
            try:
                subject = subjects.scheduler_plan(report.leader)
                report = await bus.request(subject, None, PlanReport, timeout_s=FORWARD_DEADLINE_S)
            except PrismError as error:
                log.debug("the leader does not explain itself: %s", error.message)
        await request.respond(encode(report))

    async with micro_service(
        bus,
        "prism-global-scheduler",
        instance=election.instance,
        description="Places models on workers",
        metadata={"policy": scheduler.policy_name},
        endpoints={
            "plan": (subjects.scheduler_plan(), leaders),
            "plan-of": (subjects.scheduler_plan(election.instance), own),
            **others,
        },
    ):
        yield
