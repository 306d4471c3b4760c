"""One gateway, put together: its mirrors, its subscriptions, its tasks, its HTTP server."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.identity import instance_id
from prism.common.messages.codec import decode
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.messages.placement import Route
from prism.common.micro import micro_service
from prism.common.mirror import mirror_bucket
from prism.common.tasks import end_task
from prism.common.telemetry import about
from prism.gateway.app import build_app
from prism.gateway.demand import Demand
from prism.gateway.dispatch import Dispatcher
from prism.gateway.exchange import Exchanges, GenerationEndpoint, Planned
from prism.gateway.fleet import Fleet
from prism.gateway.http_server import HttpServer, http_server
from prism.gateway.metrics import Metrics
from prism.gateway.obstacles import Obstacles
from prism.gateway.parking import Parking
from prism.gateway.plan import Planner
from prism.gateway.progress import ChoiceRunner
from prism.gateway.registry import Registry
from prism.gateway.replies import Replies
from prism.gateway.settings import Settings
from prism.gateway.silence_watch import SilenceWatch
from prism.gateway.straight_path import StraightPath
from prism.gateway.tokenizer_cache import TokenizerCache

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.25
END_DEADLINE_S = 2.0


class Gateway:
    """A running gateway."""

    def __init__(self, name: str, bus: Bus, registry: Registry, fleet: Fleet, exchanges: Exchanges) -> None:
        self.name = name
        self.server: HttpServer
        self._bus = bus
        self._registry = registry
        self._fleet = fleet
        self._exchanges = exchanges
        self._draining = False

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.url

    def unready(self) -> str | None:
        """Why it cannot serve now, None when it can."""
        if self._draining:
            return "draining: this gateway is about to end"
        if not self._bus.client.is_connected:
            return "not connected to the bus"
        if not self._registry.ready:
            return "the model registry has not been read yet"
        if self._registry.names() and not self._fleet.heard_anyone:
            return "no worker has reported lately"
        return None

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, let exchanges in progress finish for `timeout_s`, then end them with an error."""
        self._draining = True
        self.server.stop_accepting()
        await self.server.closed()
        if await self._exchanges.finished(timeout_s):
            self._exchanges.end_all(timeout_s)
            await self._exchanges.finished(END_DEADLINE_S)


@asynccontextmanager
async def running_gateway(
    bus: Bus, host: str = "127.0.0.1", port: int = 0, settings: Settings | None = None, name: str = ""
) -> AsyncIterator[Gateway]:
    """A gateway on `bus`, listening and with its registry mirrored; ended with the block. Without a `name` it
    gives itself one.

    Raises, in a group: PrismError(internal) when the address is taken, and what any of its tasks fails with.
    """
    settings = settings or Settings()
    name = name or instance_id("gateway")
    clock = asyncio.get_running_loop().time
    metrics = Metrics()
    demand = Demand(name, clock)

    def parked_changed(model: str) -> None:
        count = parking.count(model)
        metrics.parked(model, count)
        demand.parked_changed(model, count)

    def fleet_changed() -> None:
        for model in parking.models():
            known = facts.values.get(subjects.facts_key(model))
            version = known.version if known is not None else ""
            if fleet.choose(model, version=version) is not None or fleet.failure(model) is not None:
                parking.wake(model)

    def facts_changed(key: str, facts: ModelFacts | None) -> None:
        # Of another version of the model, what waits has waited in vain.
        if facts is not None:
            parking.wake(facts.model)

    obstacles = Obstacles(clock)
    parking = Parking(
        clock,
        per_model=settings.park_per_model,
        total=settings.park_total,
        on_change=parked_changed,
        obstacle=obstacles.of,
    )
    fleet = Fleet(clock, settings.silence_s, fleet_changed)
    replies = Replies()
    exchanges = Exchanges()
    bus.on_return.append(replies.bus_returned)

    async def on_load(message: Msg) -> None:
        fleet.on_load(decode(message.data, LoadReport))

    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
        # One that follows no more tells old news for ever: that ends the gateway.
        owned = tasks.create_task
        specs = await stack.enter_async_context(
            mirror_bucket(bus, subjects.BUCKET_MODELS, ModelSpec, pattern="spec.*", spawn=owned)
        )
        facts = await stack.enter_async_context(
            mirror_bucket(
                bus,
                subjects.BUCKET_MODELS,
                ModelFacts,
                pattern="facts.*",
                on_change=facts_changed,
                spawn=owned,
            )
        )
        await stack.enter_async_context(
            mirror_bucket(bus, subjects.BUCKET_ROUTES, Route, on_change=fleet.on_route, spawn=owned)
        )
        for subject, handler in ((subjects.load("*"), on_load), (subjects.replies(name), replies.take)):
            subscription = await bus.subscribe(subject, handler, inline=True)
            stack.push_async_callback(subscription.unsubscribe)
        registry = Registry(specs, facts, fleet, obstacles)
        dispatcher = Dispatcher(bus, name, settings, fleet, registry, parking, replies, metrics, clock)
        tokenizers = await stack.enter_async_context(TokenizerCache(bus))
        planner = partial(Planner, registry, tokenizers, settings, clock)
        runner = ChoiceRunner(dispatcher, demand, metrics, clock)
        gateway = Gateway(name, bus, registry, fleet, exchanges)

        endpoints: dict[str, GenerationEndpoint] = {}

        def endpoint(path: str, plan: Planned) -> GenerationEndpoint:
            made = GenerationEndpoint(path, plan, planner, runner, metrics, exchanges, settings)
            endpoints[path] = made
            return made

        app = build_app(
            registry=registry,
            metrics=metrics,
            endpoint=endpoint,
            unready=gateway.unready,
            created=int(time.time()),
        )
        await bus.flush()
        watch = SilenceWatch(fleet, clock, WATCH_INTERVAL_S)
        for loop, what in (
            (demand.run(bus, parking), "demand reports"),
            (_watch(bus, fleet, watch, replies), "watch workers"),
            (obstacles.run(bus), "ask for obstacles"),
        ):
            stack.push_async_callback(end_task, tasks.create_task(loop, name=what))
        gateway.server = await stack.enter_async_context(
            http_server(StraightPath(app, endpoints), host, port)
        )
        stack.push_async_callback(gateway.drain, 0)
        await stack.enter_async_context(
            micro_service(
                bus,
                "prism-gateway",
                instance=name,
                description="OpenAI-compatible HTTP in front of the bus",
                metadata={"url": gateway.url},
            )
        )
        yield gateway


async def _watch(bus: Bus, fleet: Fleet, watch: SilenceWatch, replies: Replies) -> None:
    """Notice workers that are gone, until cancelled."""
    while True:
        await asyncio.sleep(WATCH_INTERVAL_S)
        retiring = fleet.retiring()
        for worker in watch.look(connected=bus.client.is_connected):
            # A lost worker is the leading scheduler's to tell.
            how = "has retired" if worker in retiring else "has gone silent"
            log.info("a worker %s", how, extra=about(worker=worker))
            replies.worker_lost(worker)
