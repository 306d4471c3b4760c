"""A scripted worker and gateway for the tests of the global scheduler.

They are test doubles of the command protocol: real messages on a real NATS server, but no engine behind them.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from nats.aio.msg import Msg

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.load import DemandReport, LoadReport, ModelDemand, ModelLoad
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.common.tasks import end_task
from prism.global_scheduler.scheduler import GlobalScheduler
from prism.global_scheduler.service import run_global_scheduler
from prism.scheduling.ledger import MemoryLedger
from prism.scheduling.memory import weights_bytes
from prism.scheduling.placement.lru import LruPlacement

KV = 10
REPORT_S = 0.1
DEADLINE_S = 15.0


class Watched:
    """Something whose changes a test can wait for."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()

    async def changed(self) -> None:
        """Tell those who wait."""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        """Wait for `true()`."""
        async with asyncio.timeout(deadline_s), self._changed:
            await self._changed.wait_for(true)


class ScriptedWorker(Watched):
    """A test double of a worker: carries out commands at once, or as told, and reports its load.

    Of the kinds in `lose_next` the next command is lost on its way here; without `answers`, all answers are.
    """

    def __init__(self, bus: Bus, name: str, limit: int, gpu_id: int = 0) -> None:
        super().__init__()
        self.gpu_id = gpu_id
        self.prefill_tokens_per_s: float | None = None
        self.name = name
        self.ledger = MemoryLedger(limit)
        self.states: dict[str, ModelState] = {}
        self.commands: list[Command] = []
        self.epoch = 0
        self.fail_next: dict[str, str] = {}
        self.running: set[str] = set()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.answers = True
        self.lose_next: set[CommandKind] = set()
        self.lost: list[CommandKind] = []
        self.reports = True
        self.overlap = False
        self._bus = bus
        self._since: dict[str, float] = {}
        self._versions: dict[str, str] = {}
        self._at_work: set[str] = set()

    def kinds(self) -> list[tuple[CommandKind, str]]:
        """What was asked, in order."""
        return [(command.kind, command.spec.model_name) for command in self.commands]

    async def set_state(self, model: str, state: ModelState) -> None:
        """Come into a state, and tell it."""
        self.states[model] = state
        self._since[model] = monotonic()
        await self.report()
        await self.changed()

    async def on_command(self, message: Msg) -> None:
        command = decode(message.data, Command)
        model = command.spec.model_name
        if command.kind in self.lose_next:
            self.lose_next.remove(command.kind)
            self.lost.append(command.kind)
            await self.changed()
            return
        error: PrismError | None = None
        if command.epoch < self.epoch:
            error = PrismError(ErrorCode.STALE_EPOCH, f"epoch {command.epoch} is over")
        else:
            self.epoch = command.epoch
            self.commands.append(command)
            self.overlap |= model in self._at_work
            self._at_work.add(model)
            await self.changed()
            try:
                await self._execute(command)
            except PrismError as caught:
                error = caught
            self._at_work.discard(model)
        if self.answers:
            state = self.states.get(model, ModelState.COLD)
            body = error.body if error else None
            await message.respond(encode(CommandOutcome(self.name, model, state, body, {"total": 0.01})))

    async def _execute(self, command: Command) -> None:
        model = command.spec.model_name
        if command.kind is CommandKind.ACTIVATE:
            self.ledger.reserve(model, weights=weights_bytes(command.facts, 1), kv=command.kv_bytes)
            self._versions[model] = command.facts.version
            await self.set_state(model, ModelState.STARTING)
            await self.go_on.wait()
            if (reason := self.fail_next.pop(model, None)) is not None:
                self.ledger.release(model)
                await self.set_state(model, ModelState.FAILED)
                raise PrismError(ErrorCode.MODEL_FAILED, reason)
            await self.set_state(model, ModelState.ACTIVE)
        else:
            await self.set_state(model, ModelState.DRAINING)
            await self.go_on.wait()
            self.ledger.release(model)
            dozes = command.kind is CommandKind.DOZE
            await self.set_state(model, ModelState.DOZING if dozes else ModelState.COLD)

    async def report(self) -> None:
        """Publish a load report."""
        if not self.reports:
            return
        now = monotonic()
        models = [
            ModelLoad(
                model=model,
                state=state,
                running=int(model in self.running),
                weights_bytes=self.ledger.held(model).weights,
                kv_quota_bytes=self.ledger.held(model).kv,
                # Long idle, so that a model that came up just now can make room at once.
                idle_s=0.0 if model in self.running else 60.0,
                state_s=now - self._since[model] + 30.0,
                prefill_tokens_per_s=self.prefill_tokens_per_s,
                version="" if state is ModelState.COLD else self._versions.get(model, ""),
            )
            for model, state in self.states.items()
        ]
        await self._bus.publish(
            subjects.load(self.name),
            LoadReport(
                self.name,
                "node",
                "simulated",
                [self.gpu_id],
                self.ledger.limit_bytes,
                self.ledger.reserved_bytes,
                models,
                element_bytes=1,
                epoch=self.epoch,
                commanded=sorted(self._at_work),
            ),
        )


class ScriptedGateway(Watched):
    """A test double of a gateway: reports the demand that a test sets."""

    def __init__(self, bus: Bus) -> None:
        super().__init__()
        self.parked: dict[str, float] = {}
        self.came: dict[str, tuple[int, int]] = {}
        self._bus = bus

    async def park(self, *models: str) -> None:
        """Requests for exactly these models wait from now on."""
        self.parked = {model: self.parked.get(model, monotonic()) for model in models}
        await self.report()

    async def report(self) -> None:
        """Publish a demand report."""
        now = monotonic()
        models = [
            ModelDemand(
                model,
                int(model in self.parked),
                now - self.parked.get(model, now),
                requests=self.came.get(model, (0, 0))[0],
                prompt_tokens=self.came.get(model, (0, 0))[1],
            )
            for model in {**self.parked, **self.came}
        ]
        await self._bus.publish(subjects.demand("gateway-1"), DemandReport("gateway-1", models))


@asynccontextmanager
async def repeated(report: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Report every REPORT_S."""

    async def loop() -> None:
        while True:
            await report()
            await asyncio.sleep(REPORT_S)

    task = asyncio.create_task(loop())
    try:
        yield
    finally:
        await end_task(task)


WorkerFactory = Callable[..., AbstractAsyncContextManager[ScriptedWorker]]
SchedulerFactory = Callable[..., AbstractAsyncContextManager[GlobalScheduler]]
Register = Callable[..., Awaitable[None]]


@pytest.fixture
def scripted_worker(bus: Bus) -> WorkerFactory:
    """Starts a scripted worker: name, memory limit in bytes, id of its GPU."""

    @asynccontextmanager
    async def start(
        name: str = "worker-1", limit: int = 100, gpu_id: int = 0
    ) -> AsyncIterator[ScriptedWorker]:
        worker = ScriptedWorker(bus, name, limit, gpu_id)
        subscription = await bus.subscribe(subjects.command(name), worker.on_command)
        await bus.flush()
        async with repeated(worker.report):
            yield worker
        await subscription.unsubscribe()

    return start


@pytest.fixture
async def gateway(bus: Bus) -> AsyncIterator[ScriptedGateway]:
    """A scripted gateway."""
    scripted = ScriptedGateway(bus)
    async with repeated(scripted.report):
        yield scripted


@pytest.fixture
def scheduler(fresh_nats: NatsServer) -> SchedulerFactory:
    """Runs a real global scheduler of this name, on a connection of its own."""

    @asynccontextmanager
    async def start(name: str = "scheduler-1", **options: Any) -> AsyncIterator[GlobalScheduler]:
        policy = options.pop("policy", LruPlacement(patience_s=0.5, min_active_s=0.5, drain_s=5.0))
        async with (
            connect_bus(fresh_nats.url, name=name) as own,
            run_global_scheduler(own, name, policy, policy_name="lru", **options) as running,
        ):
            yield running

    return start


@pytest.fixture
def register_model(bus: Bus) -> Register:
    """Puts a model of a size in bytes into the registry, spec and facts, as its store would."""

    async def register(name: str, size: int = 60, version: str = "", **spec: Any) -> None:
        bucket = await bus.bucket(subjects.BUCKET_MODELS)
        facts = ModelFacts(
            name, parameters=size - KV, kv_elements_per_token=1, context_length=KV // 2, version=version
        )
        await bucket.put(subjects.facts_key(name), encode(facts))
        await bucket.put(subjects.spec_key(name), encode(ModelSpec(name, f"/{name}", **spec)))

    return register
