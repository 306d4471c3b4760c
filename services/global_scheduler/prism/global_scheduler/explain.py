"""The micro service that shows the scheduler on the bus, and answers why things are as they are."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from nats.micro.request import Request

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.explain import ExplainReply, ExplainRequest, PlanReport
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
    """Answer `PlanReport`s and `ExplainReply`s: the leader's on the common subject, whoever is asked, and
    each one's own. `others` are further endpoints of the service."""

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

    def answer(request: Request) -> ExplainReply:
        try:
            question = decode(request.data, ExplainRequest) if request.data else ExplainRequest()
            if question.obstacles:
                found = scheduler.obstacles()
                return ExplainReply(election.instance, scheduler.policy_name, obstacles=found)
            model = question.model
            models = scheduler.explain_models(model)
            if model and not models:
                raise PrismError(ErrorCode.MODEL_NOT_FOUND, f"no model {model!r} is registered")
        except PrismError as error:
            return ExplainReply(election.instance, scheduler.policy_name, error=error.body)
        return ExplainReply(election.instance, scheduler.policy_name, models)

    async def own_models(request: Request) -> None:
        await request.respond(encode(answer(request)))

    async def leaders_models(request: Request) -> None:
        reply = None
        if election.leader not in ("", election.instance):
            try:
                question = decode(request.data, ExplainRequest) if request.data else ExplainRequest()
                subject = subjects.scheduler_explain(election.leader)
                reply = await bus.request(subject, question, ExplainReply, timeout_s=FORWARD_DEADLINE_S)
            except PrismError as error:
                log.debug("the leader does not explain itself: %s", error.message)
        await request.respond(encode(reply if reply is not None else answer(request)))

    async with micro_service(
        bus,
        "prism-global-scheduler",
        instance=election.instance,
        description="Places models on workers",
        metadata={"policy": scheduler.policy_name},
        endpoints={
            "plan": (subjects.scheduler_plan(), leaders),
            "plan-of": (subjects.scheduler_plan(election.instance), own),
            "explain": (subjects.scheduler_explain(), leaders_models),
            "explain-of": (subjects.scheduler_explain(election.instance), own_models),
            **others,
        },
    ):
        yield
