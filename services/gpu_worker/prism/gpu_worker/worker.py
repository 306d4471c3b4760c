"""The worker service: bus in front, model instances behind. Carries out commands, reports load."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.kv import KeyValue

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.events import Event
from prism.common.messages.generation import CancelRequest, GenerateRequest
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome, Route
from prism.common.mirror import mirror_bucket
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.engine_protocol import Progress
from prism.gpu_worker.frames import FramePublisher
from prism.gpu_worker.generation import GenerationRequests
from prism.gpu_worker.model_instance import EngineLimits, ModelInstance
from prism.scheduling.admission import AdmissionPolicy
from prism.scheduling.ledger import MemoryLedger

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.25
EXPIRY_INTERVAL_S = 0.25
COMMAND_DONE = {
    CommandKind.ACTIVATE: "activated",
    CommandKind.DOZE: "dozed",
    CommandKind.RELEASE: "released",
}
PROGRESS_EVENT_INTERVAL_S = 0.25


@dataclass(frozen=True)
class WorkerIdentity:
    """Who a worker is: its instance id, its node, and the cluster-wide ids of the GPUs it owns."""

    worker: str
    node: str
    gpu_ids: list[int] = field(default_factory=lambda: [0])


class Worker:
    """All models of one node's GPUs. Made by `run_worker`."""

    def __init__(
        self,
        identity: WorkerIdentity,
        bus: Bus,
        device: Device,
        publisher: FramePublisher,
        tasks: asyncio.TaskGroup,
        *,
        admission: AdmissionPolicy,
        memory_limit_bytes: int,
        store_socket: str,
        limits: EngineLimits,
    ) -> None:
        self.identity = identity
        self.ledger = MemoryLedger(memory_limit_bytes)
        self.instances: dict[str, ModelInstance] = {}
        self.draining = False
        self.epoch = 0
        self._bus = bus
        self._device = device
        self._tasks = tasks
        self._store_socket = store_socket
        self._limits = limits
        self._routes: KeyValue | None = None
        self._subscriptions: dict[str, Subscription] = {}
        self._report_now = asyncio.Event()
        self._progress_told: dict[str, float] = {}
        self._loops: list[asyncio.Task[None]] = []
        self.requests = GenerationRequests(
            publisher, admission, self.instances.get, self._spawn, limits.max_running_requests
        )

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        return self._tasks.create_task(work, name=name)

    async def start(self) -> None:
        """Listen for commands, cancellations; begin to report."""
        me = self.identity.worker
        self._routes = await self._bus.bucket(subjects.BUCKET_ROUTES)
        await self._bus.subscribe(subjects.command(me), self._on_command)
        await self._bus.subscribe(subjects.cancel(me), self._on_cancel, inline=True)
        self._loops = [
            self._spawn(self._report_load(), name="load reports"),
            self._spawn(self._expire(), name="request deadlines"),
        ]
        await self._bus.flush()

    # Requests

    async def _on_request(self, message: Msg) -> None:
        self.requests.arrive(decode(message.data, GenerateRequest), message.reply)

    async def _on_cancel(self, message: Msg) -> None:
        self.requests.cancel(decode(message.data, CancelRequest).rid)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            self.requests.expire()

    # Commands

    async def _on_command(self, message: Msg) -> None:
        try:
            command = decode(message.data, Command)
        except PrismError as error:
            refused = CommandOutcome(self.identity.worker, "", ModelState.COLD, error.body)
            await message.respond(encode(refused))
            return
        try:
            outcome = await self._execute(command)
        except PrismError as error:
            outcome = self._outcome(command, error=error)
        except Exception as error:
            log.exception("%s of %s failed", command.kind, command.spec.model_name)
            outcome = self._outcome(
                command, error=PrismError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")
            )
        await message.respond(encode(outcome))
        self._report_now.set()

    def _outcome(
        self, command: Command, seconds: dict[str, float] | None = None, error: PrismError | None = None
    ) -> CommandOutcome:
        instance = self.instances.get(command.spec.model_name)
        return CommandOutcome(
            worker=self.identity.worker,
            model=command.spec.model_name,
            state=instance.state if instance else ModelState.COLD,
            error=error.body if error else None,
            seconds=seconds or {},
        )

    async def _execute(self, command: Command) -> CommandOutcome:
        if command.epoch < self.epoch:
            raise PrismError(
                ErrorCode.STALE_EPOCH,
                f"epoch {command.epoch} is over, {self.epoch} commands {self.identity.worker}",
            )
        self.epoch = command.epoch
        if self.draining and command.kind is CommandKind.ACTIVATE:
            raise PrismError(ErrorCode.OVERLOADED, f"{self.identity.worker} is draining", retry=True)
        instance = self._instance(command)
        async with instance.lock:
            before = instance.state
            match command.kind:
                case CommandKind.ACTIVATE:
                    seconds = await instance.activate(command.kv_bytes, command.deadline_s)
                case CommandKind.DOZE:
                    seconds = await self._doze(instance, command.drain_s, command.deadline_s)
                case CommandKind.RELEASE:
                    seconds = await self._release(instance, command.drain_s)
                case _:
                    raise PrismError(
                        ErrorCode.UNSUPPORTED,
                        f"{command.kind} is not something the {self._device.name} device can do",
                    )
            if command.kind is CommandKind.ACTIVATE:
                await self._open_route(instance)
        self._tell_done(command, instance, before, seconds)
        return self._outcome(command, seconds)

    def _tell_done(
        self, command: Command, instance: ModelInstance, before: ModelState, seconds: dict[str, float]
    ) -> None:
        if not seconds:
            return
        weights, kv = instance.engine.resident_bytes() if instance.engine is not None else (0, 0)
        event = Event(
            kind=COMMAND_DONE[command.kind],
            model=instance.name,
            source=self.identity.worker,
            worker=self.identity.worker,
            detail=f"from {before}",
            seconds=seconds,
            bytes={"weights": weights, "kv": kv},
        )
        self._spawn(self._bus.tell(event), name=f"event {instance.name}")

    def _instance(self, command: Command) -> ModelInstance:
        name = command.spec.model_name
        instance = self.instances.get(name)
        if instance is None:
            instance = self.instances[name] = ModelInstance(
                command.spec,
                command.facts,
                device=self._device,
                ledger=self.ledger,
                store_socket=self._store_socket,
                limits=self._limits,
                on_state=self._on_state,
                on_outputs=self.requests.on_outputs,
                on_engine_lost=self._on_engine_lost,
                on_progress=self._on_progress,
            )
        elif instance.engine is None:
            instance.spec, instance.facts = command.spec, command.facts
        return instance

    async def _doze(self, instance: ModelInstance, drain_s: float, deadline_s: float) -> dict[str, float]:
        if instance.state is ModelState.DOZING:
            return {}
        if instance.state is not ModelState.ACTIVE:
            raise PrismError(ErrorCode.INVALID_REQUEST, f"{instance.name} is {instance.state}, not active")
        drained = await self._drain(instance, drain_s)
        try:
            seconds = await instance.doze(deadline_s)
        except PrismError:
            if instance.state is ModelState.ACTIVE:
                await self._open_route(instance)
            raise
        return {**seconds, "drain": drained}

    async def _release(self, instance: ModelInstance, drain_s: float) -> dict[str, float]:
        began = time.perf_counter()
        if instance.state is ModelState.ACTIVE:
            await self._drain(instance, drain_s)
        await instance.discard_engine(ModelState.COLD)
        return {"total": time.perf_counter() - began}

    async def _drain(self, instance: ModelInstance, drain_s: float) -> float:
        began = time.perf_counter()
        instance.set_state(ModelState.DRAINING)
        await self._close_route(instance.name)
        await self.requests.drain(instance, drain_s)
        return time.perf_counter() - began

    # Routes

    async def _open_route(self, instance: ModelInstance) -> None:
        if instance.state is not ModelState.ACTIVE or instance.name in self._subscriptions:
            return
        worker = self.identity.worker
        subscription = await self._bus.subscribe(
            subjects.request(instance.name, worker), self._on_request, inline=True
        )
        self._subscriptions[instance.name] = subscription
        await self._bus.flush()
        await self._write_route(instance.name)

    async def _write_route(self, model: str) -> None:
        assert self._routes is not None
        route = Route(model, self.identity.worker, self.identity.node)
        await self._routes.put(subjects.route_key(model, self.identity.worker), encode(route))

    def on_route(self, key: str, route: Route | None) -> None:
        """Write a route of ours again that somebody took down: the leader does when we fall silent."""
        if route is not None:
            return
        for model in self._subscriptions:
            if subjects.route_key(model, self.identity.worker) == key:
                log.warning("route of %s was taken down by somebody else, written again", model)
                self._spawn(self._write_route(model), name=f"route {model}")

    async def _close_route(self, model: str) -> None:
        subscription = self._subscriptions.pop(model, None)
        if subscription is None:
            return
        assert self._routes is not None
        try:
            await self._routes.delete(subjects.route_key(model, self.identity.worker))
            await subscription.unsubscribe()
        except (nats.errors.Error, nats.js.errors.Error, OSError) as error:
            # Gateways learn it from "moved" or "no responders" instead.
            log.warning("route of %s not taken down: %s", model, error)

    # What instances tell

    def _on_state(self, instance: ModelInstance) -> None:
        log.info(
            "%s is %s%s", instance.name, instance.state, f": {instance.failure}" if instance.failure else ""
        )
        self._report_now.set()
        held = self.ledger.held(instance.name)
        event = Event(
            kind=str(instance.state),
            model=instance.name,
            source=self.identity.worker,
            worker=self.identity.worker,
            detail=instance.failure or "",
            bytes={"weights": held.weights, "kv": held.kv},
        )
        self._spawn(self._bus.tell(event), name=f"event {instance.name}")

    def _on_engine_lost(self, instance: ModelInstance, how: str) -> None:
        log.error("engine of %s ended: %s; its requests go on elsewhere", instance.name, how)
        self.requests.engine_lost(instance, how)
        self._spawn(self._close_route(instance.name), name=f"close route {instance.name}")

    def _on_progress(self, instance: ModelInstance, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._progress_told.get(instance.name, 0.0) < PROGRESS_EVENT_INTERVAL_S:
            return
        self._progress_told[instance.name] = now
        event = Event(
            kind="progress",
            model=instance.name,
            source=self.identity.worker,
            worker=self.identity.worker,
            bytes={"done": progress.done_bytes, "total": progress.total_bytes},
        )
        self._spawn(self._bus.tell(event), name=f"progress {instance.name}")

    # Load

    def load_report(self) -> LoadReport:
        """What this worker is and holds, now."""
        return LoadReport(
            worker=self.identity.worker,
            node=self.identity.node,
            device=self._device.name,
            gpu_ids=self.identity.gpu_ids,
            memory_limit_bytes=self.ledger.limit_bytes,
            memory_reserved_bytes=self.ledger.reserved_bytes,
            models=[instance.load(self.requests.queued(name)) for name, instance in self.instances.items()],
            element_bytes=self._device.element_bytes,
            epoch=self.epoch,
            draining=self.draining,
        )

    async def _report_load(self) -> None:
        subject = subjects.load(self.identity.worker)
        while True:
            self._report_now.clear()
            try:
                await self._bus.publish(subject, self.load_report())
            except (nats.errors.Error, OSError) as error:
                log.debug("load report not sent: %s", error)
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._report_now.wait()
            except TimeoutError:
                continue

    # End

    async def drain(self, drain_s: float) -> None:
        """Take no more requests, let the ones here finish for `drain_s`, end all engines."""
        self.draining = True
        self._report_now.set()

        async def retire(instance: ModelInstance) -> None:
            async with instance.lock:
                await self._release(instance, drain_s)

        results = await asyncio.gather(
            *(retire(instance) for instance in self.instances.values()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                log.error("an engine did not end cleanly: %s", result)

    def stop_reporting(self) -> None:
        """End the loops that `start` began."""
        for loop in self._loops:
            loop.cancel()


@asynccontextmanager
async def run_worker(
    identity: WorkerIdentity,
    bus: Bus,
    device: Device,
    publisher: FramePublisher,
    *,
    drain_s: float,
    make: Callable[..., Worker] = Worker,
    **options: Any,
) -> AsyncIterator[Worker]:
    """A worker that listens and reports; drained at the end."""
    async with asyncio.TaskGroup() as tasks:
        worker = make(identity, bus, device, publisher, tasks, **options)
        try:
            await worker.start()
            pattern = f"*.{identity.worker}"
            async with mirror_bucket(
                bus, subjects.BUCKET_ROUTES, Route, pattern=pattern, on_change=worker.on_route
            ):
                yield worker
        finally:
            await worker.drain(drain_s)
            worker.stop_reporting()
