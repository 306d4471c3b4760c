"""What a running system says of itself on the bus, asked once: no more than `nats` would show too."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode
from prism.common.messages.explain import PlanReport
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.messages.placement import Route
from prism.common.messages.store import StoreReport
from prism.common.mirror import mirror_bucket

T = TypeVar("T")

CONNECT_DEADLINE_S = 5.0
ANSWER_DEADLINE_S = 3.0
SILENCE_S = 0.3
"""Answers to a question that everybody may answer have come when none has for so long, once every role has
answered: before that, somebody may only be busy."""

NO_RESPONDERS = "503"

ROLES = {
    "prism-gateway": "gateway",
    "prism-global-scheduler": "global_scheduler",
    "prism-gpu-worker": "gpu_worker",
    "prism-model-store": "model_store",
}


class ServiceView(msgspec.Struct, frozen=True):
    """One process: its `role` among the four services, its instance, and what else it says of itself."""

    role: str
    instance: str
    version: str
    metadata: dict[str, str]


class SystemView(msgspec.Struct, frozen=True):
    """The whole system at one moment. `stores` by instance; `plan` is None when no scheduler answers; `specs`
    in the order of names, `facts` by name."""

    nats: str
    services: list[ServiceView]
    workers: list[LoadReport]
    stores: dict[str, StoreReport]
    plan: PlanReport | None
    specs: list[ModelSpec]
    facts: dict[str, ModelFacts]
    routes: list[Route]

    def problems(self) -> list[str]:
        """What keeps the system from serving, as far as can be seen from here; empty when nothing does."""
        there = {service.role for service in self.services}
        missing = [f"no {role} answers" for role in ROLES.values() if role not in there]
        if self.plan is not None and not self.plan.leader:
            missing.append("no global_scheduler leads")
        reporting = {worker.worker for worker in self.workers}
        silent = [
            f"worker {service.instance} reports no load"
            for service in self.services
            if service.role == "gpu_worker" and service.instance not in reporting
        ]
        return missing + silent


@asynccontextmanager
async def inspected_bus(nats_url: str) -> AsyncIterator[Bus]:
    """A connection for a look at a system. Raises PrismError when no NATS server answers at `nats_url`."""
    async with connect_bus(nats_url, name="prism inspection", deadline_s=CONNECT_DEADLINE_S) as bus:
        yield bus


async def look(bus: Bus) -> SystemView:
    """Ask everybody.

    Raises PrismError: moved when this bus carries no Prism, deadline_exceeded when the bus stops answering.
    """
    async with _heard_loads(bus) as loads:
        services = await _services(bus)
        workers = {service.instance for service in services if service.role == "gpu_worker"}
        stores_there = [service.instance for service in services if service.role == "model_store"]
        stores, plan, reports = await asyncio.gather(
            asyncio.gather(
                *(_ask(bus, subjects.store(store, "list"), StoreReport) for store in stores_there)
            ),
            _ask(bus, subjects.scheduler_plan(), PlanReport),
            loads.of(workers),
        )
    specs = await _read(bus, subjects.BUCKET_MODELS, ModelSpec, "spec.>")
    facts = await _read(bus, subjects.BUCKET_MODELS, ModelFacts, "facts.>")
    routes = await _read(bus, subjects.BUCKET_ROUTES, Route, ">")
    address = bus.client.connected_url.netloc if bus.client.connected_url else ""
    if specs is None and not services:
        raise PrismError(
            ErrorCode.MOVED,
            f"no Prism is on the bus at {address}; `prism up` prints the address of its own, --nats takes it",
        )
    by_name = sorted((specs or {}).values(), key=lambda spec: spec.model_name)
    return SystemView(
        nats=address,
        services=services,
        workers=sorted(reports, key=lambda report: (report.gpu_ids, report.worker)),
        stores={name: store for name, store in zip(stores_there, stores, strict=True) if store is not None},
        plan=plan,
        specs=by_name,
        facts={
            spec.model_name: (facts or {})[key]
            for spec in by_name
            if (key := subjects.facts_key(spec.model_name)) in (facts or {})
        },
        routes=sorted((routes or {}).values(), key=lambda route: (route.model, route.worker)),
    )


async def _services(bus: Bus) -> list[ServiceView]:
    """Every instance that answers $SRV.INFO, in the order of roles and instances."""
    inbox = bus.client.new_inbox()
    answers = await bus.client.subscribe(inbox)
    found: list[ServiceView] = []
    silent = set(ROLES.values())
    try:
        await bus.client.publish("$SRV.INFO", b"", reply=inbox)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                while True:
                    answer = await answers.next_msg(ANSWER_DEADLINE_S if silent else SILENCE_S)
                    if (answer.headers or {}).get("Status") == NO_RESPONDERS:
                        break
                    info = json.loads(answer.data)
                    role = ROLES.get(info["name"])
                    if role is not None:
                        metadata = dict(info["metadata"])
                        instance = metadata.pop("instance", info["id"])
                        found.append(ServiceView(role, instance, info["version"], metadata))
                        silent.discard(role)
    finally:
        await answers.unsubscribe()
    order = list(ROLES.values())
    return sorted(found, key=lambda service: (order.index(service.role), service.instance))


async def _ask(bus: Bus, subject: str, kind: type[T]) -> T | None:
    try:
        return await bus.request(subject, None, kind, timeout_s=ANSWER_DEADLINE_S)
    except PrismError:
        return None


async def _read(bus: Bus, bucket: str, kind: type[T], pattern: str) -> dict[str, T] | None:
    """The decoded entries of a bucket, None if there is no such bucket (which is not made by looking)."""
    try:
        await bus.jetstream.key_value(bucket)
        async with mirror_bucket(bus, bucket, kind, pattern=pattern, deadline_s=ANSWER_DEADLINE_S) as mirror:
            return dict(mirror.values)
    except nats.js.errors.BucketNotFoundError:
        return None
    except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
        raise PrismError(
            ErrorCode.DEADLINE_EXCEEDED, f"the bus does not give its bucket {bucket}: {error!r}", retry=True
        ) from error


class _Loads:
    """The newest load report of each worker that was heard."""

    def __init__(self) -> None:
        self._reports: dict[str, LoadReport] = {}
        self._changed = asyncio.Event()

    async def take(self, message: Msg) -> None:
        """One report."""
        report = decode(message.data, LoadReport)
        self._reports[report.worker] = report
        self._changed.set()

    async def of(self, workers: set[str]) -> list[LoadReport]:
        """The reports of all `workers`, and of others that were heard; without those that stay silent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                while not workers <= set(self._reports):
                    self._changed.clear()
                    await self._changed.wait()
        return list(self._reports.values())


@asynccontextmanager
async def _heard_loads(bus: Bus) -> AsyncIterator[_Loads]:
    loads = _Loads()
    subscription = await bus.subscribe(subjects.load("*"), loads.take, inline=True)
    try:
        yield loads
    finally:
        await subscription.unsubscribe()
