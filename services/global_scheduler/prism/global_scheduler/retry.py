"""Taking up a failed model again: its folder is looked at anew, and nobody holds its failure against it.

Each part of that belongs to someone: what is in the folder to the node's model store, the failed state to the
worker that failed, the backoff to this scheduler. Here they are asked, in this order.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import nats.errors
import nats.js.errors
from nats.micro.request import Request

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.events import Event
from prism.common.messages.models import ModelFacts, ModelState
from prism.common.messages.retry import RetryOutcome, RetryRequest
from prism.common.messages.store import StoreInspection, StoreModelRequest
from prism.common.micro import EndpointHandler
from prism.common.tasks import end_task
from prism.common.telemetry import about
from prism.global_scheduler.election import Election
from prism.global_scheduler.scheduler import GlobalScheduler

log = logging.getLogger(__name__)

LONGEST_DEADLINE_S = 3600.0
NEAREST_FIRST = (
    ModelState.ACTIVE,
    ModelState.DRAINING,
    ModelState.WAKING,
    ModelState.DOZING,
    ModelState.STARTING,
    ModelState.STAGING,
)


@asynccontextmanager
async def retry_endpoints(
    bus: Bus, scheduler: GlobalScheduler, election: Election
) -> AsyncIterator[Mapping[str, tuple[str, EndpointHandler]]]:
    """Endpoints that take up models again: the leader does it, whoever is asked. Ended with the block."""
    retrying: set[asyncio.Task[None]] = set()

    async def respond(request: Request) -> None:
        try:
            await request.respond(encode(await _answer(bus, scheduler, election, request)))
        except (nats.errors.Error, OSError) as error:
            log.warning("the outcome of a retry was not sent: %s", error)

    async def handle(request: Request) -> None:
        # Requests of one subscription are handled one after the other, and to fetch a model takes long.
        task = asyncio.create_task(respond(request), name="retry")
        retrying.add(task)
        task.add_done_callback(retrying.discard)

    try:
        yield {
            "retry": (subjects.scheduler_retry(), handle),
            "retry-of": (subjects.scheduler_retry(election.instance), handle),
        }
    finally:
        for task in list(retrying):
            await end_task(task)


async def _answer(bus: Bus, scheduler: GlobalScheduler, election: Election, request: Request) -> RetryOutcome:
    model = ""
    try:
        asked = decode(request.data, RetryRequest)
        model = asked.model
        deadline_s = min(asked.deadline_s, LONGEST_DEADLINE_S)
        if election.leading:
            async with asyncio.timeout(deadline_s):
                return await retry_model(bus, scheduler, election.instance, model, deadline_s)
        leader = election.leader
        if leader in ("", election.instance) or request.subject == subjects.scheduler_retry(
            election.instance
        ):
            raise PrismError(ErrorCode.MOVED, "no scheduler leads now; try again", retry=True)
        return await bus.request(subjects.scheduler_retry(leader), asked, RetryOutcome, timeout_s=deadline_s)
    except PrismError as error:
        return RetryOutcome(model, ModelState.FAILED, error.body)
    except TimeoutError:
        late = PrismError(
            ErrorCode.DEADLINE_EXCEEDED, f"not done within {deadline_s:g} s; it goes on", retry=True
        )
        return RetryOutcome(model, ModelState.FAILED, late.body)
    except Exception as error:
        log.exception("retry failed", extra=about(model=model))
        fault = PrismError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")
        return RetryOutcome(model, ModelState.FAILED, fault.body)


async def retry_model(
    bus: Bus, scheduler: GlobalScheduler, instance: str, model: str, deadline_s: float
) -> RetryOutcome:
    """Have `model` looked at and forgiven. Raises PrismError: model_not_found, or store_unavailable when no
    store could look at it."""
    spec = scheduler.cluster.spec(model)
    if spec is None:
        raise PrismError(ErrorCode.MODEL_NOT_FOUND, f"no model {model!r} is registered")
    nodes = sorted({seen.report.node for seen in scheduler.cluster.workers.values()})
    found = await _inspect(bus, model, nodes, deadline_s)
    if found.error is not None:
        return RetryOutcome(model, ModelState.FAILED, PrismError(ErrorCode.MODEL_FAILED, found.error).body)
    # Each store said what stood when it had looked; by now another may have written.
    facts = await _registered(bus, model) or found
    outcomes = await scheduler.forgive(spec, facts)
    await bus.tell(Event("retried", model, instance))
    workers = {outcome.worker: outcome.state for outcome in outcomes}
    for outcome in outcomes:
        if outcome.error is not None:
            return RetryOutcome(model, outcome.state, outcome.error, facts, workers)
    states = {
        entry.state
        for seen in scheduler.cluster.workers.values()
        for entry in seen.report.models
        if entry.model == model
    }
    state = next((near for near in NEAREST_FIRST if near in states), ModelState.COLD)
    return RetryOutcome(model, state, facts=facts, workers=workers)


async def _registered(bus: Bus, model: str) -> ModelFacts | None:
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    try:
        entry = await bucket.get(subjects.facts_key(model))
    except nats.js.errors.KeyNotFoundError:
        return None
    return decode(entry.value or b"", ModelFacts)


async def _inspect(bus: Bus, model: str, nodes: list[str], deadline_s: float) -> ModelFacts:
    """What the stores of `nodes` find now: the facts of the first that can read the model, else a reason."""

    async def ask(node: str) -> ModelFacts | PrismError:
        try:
            subject = subjects.store(node, "inspect")
            answer = await bus.request(
                subject, StoreModelRequest(model), StoreInspection, timeout_s=deadline_s
            )
        except (PrismError, nats.errors.Error, OSError) as error:
            return PrismError(ErrorCode.STORE_UNAVAILABLE, f"the model store of {node}: {error}", retry=True)
        if answer.facts is not None:
            return answer.facts
        return PrismError.from_body(answer.error) if answer.error else PrismError(ErrorCode.INTERNAL, node)

    answers = await asyncio.gather(*map(ask, nodes))
    found = [answer for answer in answers if isinstance(answer, ModelFacts)]
    if found:
        return min(found, key=lambda facts: facts.error is not None)
    for answer in answers:
        if isinstance(answer, PrismError):
            raise answer
    raise PrismError(
        ErrorCode.STORE_UNAVAILABLE,
        "no worker reports, so there is no node to look for the model on",
        retry=True,
    )
