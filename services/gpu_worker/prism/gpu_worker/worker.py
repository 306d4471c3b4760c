"""The worker: carries out the scheduler's commands on its model instances, for as long as it runs."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError, shortened
from prism.common.messages.codec import decode, encode, names_in
from prism.common.messages.generation import CancelRequest, GenerateRequest
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelState, same_version
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.common.tasks import end_task
from prism.common.telemetry import about
from prism.gpu_worker.announcements import Announcements
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.devices.freezing import can_freeze
from prism.gpu_worker.frames import FramePublisher
from prism.gpu_worker.generation import GenerationRequests
from prism.gpu_worker.model_instance import ASLEEP, IN_TRANSITION, EngineLimits, ModelInstance
from prism.gpu_worker.model_load import load_of
from prism.gpu_worker.quota_arbiter import QuotaArbiter
from prism.gpu_worker.routes import WorkerRoutes, worker_routes
from prism.gpu_worker.stall_watch import StallWatch
from prism.scheduling.admission import AdmissionPolicy, Bounds
from prism.scheduling.ledger import MemoryLedger

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.25
RETIRE_DEADLINE_S = 10.0


@dataclass
class WorkerIdentity:
    """Who a worker is: its instance id, its node, and the cluster-wide ids of the GPUs it owns.

    The ids change when a claim on them is lost; there are none until others are claimed.
    """

    worker: str
    node: str
    gpu_ids: list[int] = field(default_factory=lambda: [0])


class Worker:
    """All models of one node's GPUs. Made by `run_worker`."""

    routes: WorkerRoutes

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
        bounds: Bounds,
        moves_kv_quotas: bool,
    ) -> None:
        self.identity = identity
        self.ledger = MemoryLedger(memory_limit_bytes)
        self.instances: dict[str, ModelInstance] = {}
        self.draining = False
        self.epoch = 0
        self.announcements = Announcements(bus, identity.worker, self.load_report, self.spawn)
        self.requests = GenerationRequests(
            publisher,
            admission,
            self.instances.get,
            self.spawn,
            limits.max_running_requests,
            limits.chunked_prefill_tokens,
            bounds,
            self._on_demand,
        )
        self.quotas = QuotaArbiter(
            self.ledger,
            self.instances.values,
            self.spawn,
            on_changed=self._on_quota_changed,
            moves=moves_kv_quotas,
        )
        self._transitions: dict[str, asyncio.Task[Any] | None] = {}
        self._commanded: list[str] = []
        self._device = device
        self._tasks = tasks
        self._store_socket = store_socket
        self._limits = limits

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """A background task that ends with the worker."""
        try:
            return self._tasks.create_task(work, name=name)
        except RuntimeError:
            # The group is being torn down by a failure; the last things to tell are told all the same.
            return asyncio.create_task(work, name=name)

    async def on_request(self, message: Msg) -> None:
        """A generation request from the bus, answered too when it can't be read."""
        try:
            request = decode(message.data, GenerateRequest)
        except PrismError as error:
            if message.reply:
                self.requests.refuse(names_in(message.data).get("rid", ""), message.reply, error.body)
            raise
        self.requests.arrive(request, message.reply)

    async def on_cancel(self, message: Msg) -> None:
        """A cancellation from the bus."""
        self.requests.cancel(decode(message.data, CancelRequest).rid)

    async def watch_requests(self) -> None:
        """End requests that are past their deadline and engines that are stuck, until cancelled."""
        watch = StallWatch(self._limits.stall_s, WATCH_INTERVAL_S, time.monotonic())
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self.requests.expire()
            watch.looked(time.monotonic())
            for instance in self.instances.values():
                self._end_if_stuck(instance, watch)

    def _end_if_stuck(self, instance: ModelInstance, watch: StallWatch) -> None:
        engine = instance.engine
        if engine is None or instance.weights_arrived_at == math.inf:
            return
        silence_s = watch.silence_s(engine.heard_at, self.requests.working_since(instance))
        if silence_s is not None:
            engine.kill(f"stuck: it said nothing for {silence_s:.1f} s while it had requests")

    async def on_command(self, message: Msg) -> None:
        """A command from the bus, answered with what it led to."""
        try:
            command = decode(message.data, Command)
        except PrismError as error:
            refused = CommandOutcome(self.identity.worker, "", ModelState.COLD, error.body)
            await message.respond(encode(refused))
            return
        self._commanded.append(command.spec.model_name)
        try:
            outcome = await self._try(command)
            await message.respond(encode(outcome))
        except asyncio.CancelledError:
            if self.draining:
                # Cut short by `retire`: who asked may ask another worker.
                draining = PrismError(ErrorCode.OVERLOADED, f"{self.identity.worker} is draining", retry=True)
                await message.respond(encode(self._outcome(command, error=draining)))
            raise
        finally:
            # Not before the answer: a report that names it no longer says that there will be none.
            self._commanded.remove(command.spec.model_name)
        self.announcements.changed()

    async def _try(self, command: Command) -> CommandOutcome:
        try:
            return await self._execute(command)
        except PrismError as error:
            self._tell_failure(command, error)
            return self._outcome(command, error=error)
        except Exception as error:
            log.exception("%s failed", command.kind, extra=about(model=command.spec.model_name))
            return self._outcome(
                command, error=PrismError(ErrorCode.INTERNAL, shortened(f"{type(error).__name__}: {error}"))
            )

    def _tell_failure(self, command: Command, error: PrismError) -> None:
        # A scheduler whose time is over tells so itself; what cannot be done now is asked for again.
        level = logging.INFO if error.code is ErrorCode.STALE_EPOCH else logging.WARNING
        then = "it is tried again"
        instance = self.instances.get(command.spec.model_name)
        if instance is not None and instance.state is ModelState.FAILED:
            level = logging.ERROR
            then = "later requests try it again, `prism models retry` does at once"
        log.log(
            level,
            "%s failed: %s; %s",
            command.kind,
            error.message,
            then,
            extra=about(model=command.spec.model_name),
        )

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

    def _check(self, command: Command) -> None:
        if command.epoch < self.epoch:
            raise PrismError(
                ErrorCode.STALE_EPOCH,
                f"epoch {command.epoch} is over, {self.epoch} commands {self.identity.worker}",
            )
        self.epoch = command.epoch
        if self.draining and command.kind is CommandKind.ACTIVATE:
            raise PrismError(ErrorCode.OVERLOADED, f"{self.identity.worker} is draining", retry=True)

    async def _execute(self, command: Command) -> CommandOutcome:
        self._check(command)
        instance = self._instance(command)
        async with instance.lock:
            # Again: whoever held the lock before may have taken long.
            self._check(command)
            self._transitions[instance.name] = asyncio.current_task()
            if command.kind is CommandKind.ACTIVATE and instance.state in ASLEEP:
                await self._discard_other_version(instance, command.facts.version)
            instance.describe(command.spec, command.facts)
            before = instance.state
            match command.kind:
                case CommandKind.ACTIVATE:
                    open_route = partial(self.routes.open, instance.name)
                    seconds = await instance.activate(command.kv_bytes, command.deadline_s, open_route)
                case CommandKind.DOZE:
                    seconds = await self._doze(instance, command.drain_s, command.deadline_s)
                case CommandKind.FREEZE:
                    seconds = await self._freeze(instance, command.drain_s, command.deadline_s)
                case CommandKind.RELEASE:
                    seconds = await self._release(instance, command.drain_s)
                case _:
                    raise PrismError(
                        ErrorCode.UNSUPPORTED,
                        f"{command.kind} is not something the {self._device.name} device can do",
                    )
        self.announcements.command_done(instance, before, seconds)
        return self._outcome(command, seconds)

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
                on_discarded=self._on_discarded,
                on_progress=self.announcements.progress,
                room=self.quotas.room,
                kv_tokens=self.requests.kv_tokens,
            )
        return instance

    async def _discard_other_version(self, instance: ModelInstance, version: str) -> None:
        if not same_version(instance.version, version):
            log.info(
                "its files have changed: what sleeps is not woken, a new engine starts",
                extra=about(model=instance.name),
            )
            await instance.discard_engine(ModelState.COLD)

    async def _doze(self, instance: ModelInstance, drain_s: float, deadline_s: float) -> dict[str, float]:
        if instance.state is ModelState.DOZING:
            return {}
        if instance.state is ModelState.FROZEN:
            return await instance.thaw(deadline_s)
        if instance.state is not ModelState.ACTIVE:
            raise PrismError(ErrorCode.INVALID_REQUEST, f"{instance.name} is {instance.state}, not active")
        if not await instance.image.exists():
            # Without an image there is nothing to wake from; the memory is wanted all the same.
            log.info(
                "no image to wake from: its engine is released instead", extra=about(model=instance.name)
            )
            return await self._release(instance, drain_s)
        drained = await self._drain(instance, drain_s)
        try:
            return {**await instance.doze(deadline_s), "drain": drained}
        except PrismError as error:
            if error.code is ErrorCode.STORE_UNAVAILABLE:
                await instance.serve(partial(self.routes.open, instance.name), instance.idle_since)
            raise

    async def _freeze(self, instance: ModelInstance, drain_s: float, deadline_s: float) -> dict[str, float]:
        if instance.state is ModelState.FROZEN:
            return {}
        # Before anything is put to sleep for it.
        self._device.freezer.check()
        dozed = await self._doze(instance, drain_s, deadline_s)
        if instance.state is not ModelState.DOZING:
            return dozed
        return {**dozed, **await instance.freeze(deadline_s)}

    async def _release(self, instance: ModelInstance, drain_s: float) -> dict[str, float]:
        began = time.perf_counter()
        if instance.state is ModelState.ACTIVE:
            await self._drain(instance, drain_s)
        await instance.discard_engine(ModelState.COLD)
        return {"total": time.perf_counter() - began}

    async def _drain(self, instance: ModelInstance, drain_s: float) -> float:
        began = time.perf_counter()
        instance.set_state(ModelState.DRAINING)
        await self.routes.close(instance.name)
        await self.requests.drain(instance, drain_s)
        return time.perf_counter() - began

    def _on_demand(self) -> None:
        self.quotas.changed()

    def _on_quota_changed(self) -> None:
        self.requests.pump()
        self.announcements.changed()

    def _on_state(self, instance: ModelInstance) -> None:
        self.announcements.state_entered(instance, self.ledger.held(instance.name))

    def _on_engine_lost(self, instance: ModelInstance, how: str) -> None:
        log.error(
            "engine ended: %s; its requests are tried elsewhere, the next one starts it again",
            how,
            extra=about(model=instance.name),
        )
        self.requests.engine_lost(instance, how)
        self.spawn(self.routes.close(instance.name), name=f"close route {instance.name}")

    def _on_discarded(self, instance: ModelInstance) -> None:
        # Nothing may be left of an engine that is gone, however it went.
        self.requests.engine_lost(instance, "it was released")
        self.spawn(self.routes.close(instance.name), name=f"close route {instance.name}")

    def load_report(self) -> LoadReport:
        """What this worker is and holds, now."""
        # Engines with several ranks keep their quotas, and can't be frozen.
        single = 1 in self._device.rank_counts
        gpus = len(self.identity.gpu_ids)
        return LoadReport(
            worker=self.identity.worker,
            node=self.identity.node,
            device=self._device.name,
            gpu_ids=self.identity.gpu_ids,
            memory_limit_bytes=self.ledger.limit_bytes,
            memory_reserved_bytes=self.ledger.reserved_bytes,
            models=[
                load_of(instance, self.requests.queued(name), self.requests.kv_tokens(name)[1])
                for name, instance in self.instances.items()
            ],
            element_bytes=self._device.element_bytes,
            epoch=self.epoch,
            draining=self.draining,
            ready=self._device.shells.ready,
            # Every engine is on all of them.
            memory_reserved_by_gpu=[self.ledger.reserved_bytes] * gpus if gpus > 1 else [],
            profile=self._device.profile,
            elastic=single and self.quotas.moves,
            freezes=single and can_freeze(self._device.freezer),
            fixed_bytes=self._device.fixed_bytes,
            tp_sizes=list(self._device.rank_counts),
            commanded=sorted(set(self._commanded)),
        )

    async def retire(self, drain_s: float) -> None:
        """Take no more requests, let the ones here finish for `drain_s`, end all engines."""
        self.draining = True
        self.announcements.changed()
        for name, instance in self.instances.items():
            transition = self._transitions.get(name)
            if instance.state in IN_TRANSITION and transition is not None:
                # It rolls back, and lets go of the instance.
                transition.cancel()

        async def end(instance: ModelInstance) -> None:
            try:
                async with instance.lock:
                    await self._release(instance, drain_s)
            except (PrismError, OSError, TimeoutError) as error:
                log.error("engine did not end cleanly: %s", error, extra=about(model=instance.name))

        # Not of the worker's task group: it may be what is coming to an end.
        ends = {
            asyncio.create_task(end(instance), name=f"end {name}"): name
            for name, instance in self.instances.items()
        }
        if not ends:
            return
        _, late = await asyncio.wait(ends, timeout=drain_s + RETIRE_DEADLINE_S)
        for task in late:
            # Engines die with their shells' source, right after this.
            log.error("engine not ended within its deadline, it is killed", extra=about(model=ends[task]))
            await end_task(task)


@asynccontextmanager
async def run_worker(
    identity: WorkerIdentity,
    bus: Bus,
    device: Device,
    publisher: FramePublisher,
    *,
    drain_s: float,
    admission: AdmissionPolicy,
    memory_limit_bytes: int,
    store_socket: str,
    limits: EngineLimits,
    bounds: Bounds | None = None,
    moves_kv_quotas: bool = True,
) -> AsyncIterator[Worker]:
    """A worker that listens and reports; retired at the end."""
    async with asyncio.TaskGroup() as tasks:
        worker = Worker(
            identity,
            bus,
            device,
            publisher,
            tasks,
            admission=admission,
            memory_limit_bytes=memory_limit_bytes,
            store_socket=store_socket,
            limits=limits,
            bounds=bounds or Bounds(),
            moves_kv_quotas=moves_kv_quotas,
        )
        me = identity.worker
        bus.on_return.append(worker.requests.reassure)
        async with worker_routes(bus, me, identity.node, worker.on_request, worker.spawn) as worker.routes:
            await bus.subscribe(subjects.command(me), worker.on_command)
            await bus.subscribe(subjects.cancel(me), worker.on_cancel, inline=True)
            await bus.flush()
            loops = [
                worker.spawn(worker.announcements.report_load(), name="load reports"),
                worker.spawn(worker.watch_requests(), name="watch requests"),
                worker.spawn(worker.quotas.run(), name="quotas"),
            ]
            try:
                yield worker
            finally:
                await worker.retire(drain_s)
                for loop in loops:
                    await end_task(loop)
