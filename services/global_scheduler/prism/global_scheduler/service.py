"""One instance of the global scheduler: its parts, joined for as long as it runs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import nats.errors

from prism.common import subjects
from prism.common.bus import Bus, Handler
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.messages.placement import Route
from prism.common.mirror import mirror_bucket
from prism.common.tasks import end_task
from prism.global_scheduler.election import stand_for_election
from prism.global_scheduler.explain import explain_service
from prism.global_scheduler.registration import registered
from prism.global_scheduler.retry import retry_endpoints
from prism.global_scheduler.scheduler import Deadlines, GlobalScheduler
from prism.scheduling.cost import GpuProfile
from prism.scheduling.placement import PlacementPolicy


@asynccontextmanager
async def run_global_scheduler(
    bus: Bus,
    instance: str,
    policy: PlacementPolicy,
    *,
    policy_name: str,
    specs: Sequence[ModelSpec] = (),
    prune: bool = False,
    deadlines: Deadlines | None = None,
    profiles: Mapping[str, GpuProfile] | None = None,
) -> AsyncIterator[GlobalScheduler]:
    """Register `specs`, stand for election, and schedule until the end of the `async with`. `profiles` says
    by name what kinds of GPU can do, without it those that come with Prism.

    Raises PrismError when the registry can't be read or written.
    """
    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
        scheduler = GlobalScheduler(bus, tasks, policy, policy_name, deadlines or Deadlines(), profiles)
        stack.callback(scheduler.close)
        await stack.enter_async_context(registered(bus, specs, prune=prune))
        models = subjects.BUCKET_MODELS
        await stack.enter_async_context(
            mirror_bucket(bus, models, ModelSpec, pattern="spec.*", on_change=scheduler.on_spec)
        )
        await stack.enter_async_context(
            mirror_bucket(bus, models, ModelFacts, pattern="facts.*", on_change=scheduler.on_facts)
        )
        routes = await stack.enter_async_context(mirror_bucket(bus, subjects.BUCKET_ROUTES, Route))
        await stack.enter_async_context(_subscribed(bus, subjects.load("*"), scheduler.on_load))
        await stack.enter_async_context(_subscribed(bus, subjects.demand("*"), scheduler.on_demand))
        election = await stack.enter_async_context(
            stand_for_election(bus, instance, scheduler.on_leadership, scheduler.cluster.seen_epoch)
        )
        planning = tasks.create_task(scheduler.run(election, routes), name="planning")
        stack.push_async_callback(end_task, planning)
        retries = await stack.enter_async_context(retry_endpoints(bus, scheduler, election))
        await stack.enter_async_context(explain_service(bus, scheduler, election, retries))
        yield scheduler


@asynccontextmanager
async def _subscribed(bus: Bus, subject: str, handler: Handler) -> AsyncIterator[None]:
    subscription = await bus.subscribe(subject, handler, inline=True)
    try:
        yield
    finally:
        # A connection that is gone has taken its subscriptions along.
        with contextlib.suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()
