"""The routes of one worker: which models it takes requests for, listened to and written where gateways look.

A route is two things, opened and closed together: a subscription to the model's request subject here (without
it, gateways hear "no responders" at once) and a key in the bucket `prism_routes`. A bus that is away delays
both, and loses neither.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import nats.errors
import nats.js.errors
from nats.aio.subscription import Subscription

from prism.common import subjects
from prism.common.bus import Bus, Handler
from prism.common.messages.codec import encode
from prism.common.messages.placement import Route
from prism.common.mirror import mirror_bucket
from prism.common.telemetry import about

log = logging.getLogger(__name__)

RETRY_S = 0.5
OPEN_DEADLINE_S = 5.0
CLOSE_DEADLINE_S = 2.0
TAKE_DOWN_ATTEMPTS = 10
BUS_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError)


class WorkerRoutes:
    """Open routes of this worker. Made by `worker_routes`."""

    def __init__(
        self,
        bus: Bus,
        worker: str,
        node: str,
        on_request: Handler,
        spawn: Callable[..., "asyncio.Task[None]"],
    ) -> None:
        self._bus = bus
        self._worker = worker
        self._node = node
        self._on_request = on_request
        self._spawn: Callable[..., asyncio.Task[None]] = spawn
        self._wanted: set[str] = set()
        self._subscriptions: dict[str, Subscription] = {}

    async def open(self, model: str) -> None:
        """Take requests for `model`. Returns once gateways can see it, or after OPEN_DEADLINE_S, when the bus
        is away: the route then opens when it is back. Opening twice does nothing."""
        if model not in self._wanted:
            self._wanted.add(model)
            opening = self._spawn(self._establish(model), name=f"open route {model}")
            await asyncio.wait([opening], timeout=OPEN_DEADLINE_S)

    async def close(self, model: str) -> None:
        """Take no more requests for `model`. Returns once gateways can see it, or after CLOSE_DEADLINE_S."""
        if model in self._wanted:
            self._wanted.discard(model)
            subscription = self._subscriptions.pop(model, None)
            if subscription is not None:
                await self._bus.leave(subscription, CLOSE_DEADLINE_S)
            closing = self._spawn(self._take_down(model), name=f"close route {model}")
            await asyncio.wait([closing], timeout=CLOSE_DEADLINE_S)

    def forget(self) -> None:
        """Open nothing any more: the worker ends."""
        self._wanted.clear()

    async def _establish(self, model: str) -> None:
        route = encode(Route(model, self._worker, self._node))
        while model in self._wanted:
            try:
                if model not in self._subscriptions:
                    subject = subjects.request(model, self._worker)
                    subscription = await self._bus.subscribe(subject, self._on_request, inline=True)
                    if model not in self._wanted or model in self._subscriptions:
                        await self._bus.leave(subscription, CLOSE_DEADLINE_S)
                        continue
                    self._subscriptions[model] = subscription
                await self._bus.flush()
                bucket = await self._bus.bucket(subjects.BUCKET_ROUTES)
                await bucket.put(subjects.route_key(model, self._worker), route)
            except BUS_ERRORS as error:
                log.info("route not open yet, trying again: %r", error, extra=about(model=model))
                await asyncio.sleep(RETRY_S)
            else:
                break
        if model not in self._wanted:
            await self._take_down(model)

    async def _take_down(self, model: str) -> None:
        for _ in range(TAKE_DOWN_ATTEMPTS):
            if model in self._wanted:
                return
            try:
                bucket = await self._bus.bucket(subjects.BUCKET_ROUTES)
                await bucket.delete(subjects.route_key(model, self._worker))
            except BUS_ERRORS as error:
                log.debug("route not taken down yet: %r", error, extra=about(model=model))
                await asyncio.sleep(RETRY_S)
            else:
                return
        # Gateways learn it from "no responders" instead.
        log.info("route not taken down: the bus is away", extra=about(model=model))

    def on_change(self, key: str, route: Route | None) -> None:
        """Write a key of ours again that somebody deleted: the leader does when a worker falls silent."""
        if route is not None:
            return
        for model in self._subscriptions:
            if subjects.route_key(model, self._worker) == key:
                log.warning("route was taken down by somebody else, written again", extra=about(model=model))
                self._spawn(self._establish(model), name=f"route {model}")


@asynccontextmanager
async def worker_routes(
    bus: Bus,
    worker: str,
    node: str,
    on_request: Handler,
    spawn: Callable[..., "asyncio.Task[None]"],
) -> AsyncIterator[WorkerRoutes]:
    """No route open yet; `spawn` starts background tasks."""
    routes = WorkerRoutes(bus, worker, node, on_request, spawn)
    try:
        async with mirror_bucket(
            bus, subjects.BUCKET_ROUTES, Route, pattern=f"*.{worker}", on_change=routes.on_change
        ):
            yield routes
    finally:
        routes.forget()
