"""The routes of one worker: which models it takes requests for, listened to and written where gateways look.

A route is two things, opened and closed together: a subscription to the model's request subject here (without
it, gateways hear "no responders" at once) and a key in the bucket `prism_routes`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.subscription import Subscription

from prism.common import subjects
from prism.common.bus import Bus, Handler
from prism.common.messages.codec import encode
from prism.common.messages.placement import Route
from prism.common.mirror import mirror_bucket

log = logging.getLogger(__name__)

RETRY_S = 0.5
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
        self._open: dict[str, Subscription] = {}

    async def open(self, model: str) -> None:
        """Take requests for `model`; the server knows of it when this returns. Opening twice does nothing."""
        if model in self._open:
            return
        subject = subjects.request(model, self._worker)
        self._open[model] = await self._bus.subscribe(subject, self._on_request, inline=True)
        await self._bus.flush()
        await self._write(model)

    async def close(self, model: str) -> None:
        """Take no more requests for `model`."""
        subscription = self._open.pop(model, None)
        if subscription is None:
            return
        try:
            bucket = await self._bus.bucket(subjects.BUCKET_ROUTES)
            await bucket.delete(subjects.route_key(model, self._worker))
            await subscription.unsubscribe()
        except BUS_ERRORS as error:
            # Gateways learn it from "moved" or "no responders" instead.
            log.warning("route of %s not taken down: %s", model, error)

    async def _write(self, model: str) -> None:
        """Write the key, again and again while the bus cannot take it, for as long as the route is open."""
        route = Route(model, self._worker, self._node)
        while model in self._open:
            try:
                bucket = await self._bus.bucket(subjects.BUCKET_ROUTES)
                await bucket.put(subjects.route_key(model, self._worker), encode(route))
            except BUS_ERRORS as error:
                log.warning(
                    "route of %s not written (%s), trying again", model, error or type(error).__name__
                )
                await asyncio.sleep(RETRY_S)
            else:
                return

    def on_change(self, key: str, route: Route | None) -> None:
        """Write a key of ours again that somebody deleted: the leader does when a worker falls silent."""
        if route is not None:
            return
        for model in self._open:
            if subjects.route_key(model, self._worker) == key:
                log.warning("route of %s was taken down by somebody else, written again", model)
                rewriting: Coroutine[Any, Any, None] = self._write(model)
                self._spawn(rewriting, name=f"route {model}")


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
    async with mirror_bucket(
        bus, subjects.BUCKET_ROUTES, Route, pattern=f"*.{worker}", on_change=routes.on_change
    ):
        yield routes
