"""The frozen tier from command to outcome: a worker, a store and simulated engines, each a real process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from tests.gpu_worker.worker_rig import (
    KV_BYTES,
    LIMIT_BYTES,
    SMALL,
    Rig,
    device_rig,
    send,
    tokens_of,
    worker_rig,
)

from prism.cli.nats_server import NatsServer
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind
from prism.gpu_worker.devices.freezing import Freezer
from prism.gpu_worker.devices.simulated import SimulatedDevice, simulated_device
from prism.gpu_worker.devices.simulated_costs import SimulatedCosts
from prism.gpu_worker.shells import ForkServerShells
from prism.gpu_worker.started_shells import StartedShells

FIXED_BYTES = 1_000_000
PROMPT = [5, 6, 7]


class TroubledFreezer:
    """Fails as it is told to: `frozen` are the processes that it has frozen."""

    def __init__(self) -> None:
        self.frozen: set[int] = set()
        self.freeze_error: PrismError | None = None
        self.thaw_error: PrismError | None = None

    def check(self) -> None:
        """It can."""

    async def freeze(self, pid: int, deadline_s: float) -> dict[str, float]:
        if self.freeze_error is not None:
            raise self.freeze_error
        self.frozen.add(pid)
        return {"checkpoint": 0.0}

    async def thaw(self, pid: int, deadline_s: float) -> dict[str, float]:
        if self.thaw_error is not None:
            raise self.thaw_error
        self.frozen.remove(pid)
        return {"restore": 0.0}


class CountingDevice(SimulatedDevice):
    """Engines cost something beyond weights and KV cache, unless they are frozen."""

    holds_on = False

    def held_bytes(self, pid: int, ready: object) -> int:
        freezer = self.freezer
        assert isinstance(freezer, TroubledFreezer)
        return FIXED_BYTES if self.holds_on or pid not in freezer.frozen else 0


@pytest.fixture
def freezer() -> TroubledFreezer:
    return TroubledFreezer()


@pytest.fixture
async def device(freezer: TroubledFreezer) -> AsyncIterator[CountingDevice]:
    costs = SimulatedCosts(start_ms=0, doze_ms=0, wake_ms=0, decode_step_ms=1, context_bytes=FIXED_BYTES)
    async with simulated_device(costs) as simulated:
        assert isinstance(simulated.shells, StartedShells)
        counting = CountingDevice(simulated.shells, costs)
        counting.freezer = freezer
        yield counting


@pytest.fixture
async def rig(
    session_nats: NatsServer,
    module_store: Path,
    device: CountingDevice,
    tiny_models: dict[str, Path],
) -> AsyncIterator[Rig]:
    async with device_rig(session_nats, module_store, device, tiny_models) as ready:
        yield ready


def engine_pid(rig: Rig) -> int:
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    return engine.pid


async def frozen(rig: Rig) -> None:
    """Have the model frozen."""
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    outcome = await rig.command(CommandKind.FREEZE)
    assert outcome.error is None, outcome.error
    assert outcome.state is ModelState.FROZEN


async def test_an_active_model_is_frozen_holds_nothing_and_serves_again(
    rig: Rig, freezer: TroubledFreezer
) -> None:
    await rig.command(CommandKind.ACTIVATE)
    first = tokens_of(await (await send(rig, "a", PROMPT, 8)).all())
    pid = engine_pid(rig)
    outcome = await rig.command(CommandKind.FREEZE)
    assert outcome.state is ModelState.FROZEN
    assert outcome.seconds.keys() >= {"drain", "checkpoint", "total"}
    assert rig.worker.ledger.reserved_bytes == 0
    assert freezer.frozen == {pid}
    assert await (await send(rig, "b", PROMPT, 8)).next() is None, "a frozen model has no route"

    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.state is ModelState.ACTIVE
    assert outcome.seconds.keys() >= {"restore", "copy", "total"}
    assert engine_pid(rig) == pid
    assert rig.worker.ledger.held(SMALL).fixed == FIXED_BYTES
    assert tokens_of(await (await send(rig, "c", PROMPT, 8)).all()) == first


async def test_a_dozing_model_is_frozen_and_dozes_again(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    await rig.command(CommandKind.DOZE)
    assert rig.worker.ledger.reserved_bytes == FIXED_BYTES
    assert (await rig.command(CommandKind.FREEZE)).state is ModelState.FROZEN
    assert rig.worker.ledger.reserved_bytes == 0
    assert (await rig.command(CommandKind.FREEZE)).seconds == {}, "it is frozen already"
    assert (await rig.command(CommandKind.DOZE)).state is ModelState.DOZING
    assert rig.worker.ledger.reserved_bytes == FIXED_BYTES
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE


async def test_every_state_on_the_way_is_told(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    told = asyncio.create_task(rig.until_state(ModelState.FROZEN))
    await rig.command(CommandKind.FREEZE)
    load = next(load for load in (await told).models if load.model == SMALL)
    assert (load.weights_bytes, load.kv_quota_bytes, load.kv_used_bytes) == (0, 0, 0)


async def test_a_freeze_that_the_process_survives_leaves_it_dozing(
    rig: Rig, freezer: TroubledFreezer
) -> None:
    await rig.command(CommandKind.ACTIVATE)
    pid = engine_pid(rig)
    freezer.freeze_error = PrismError(ErrorCode.INTERNAL, "it was busy", retry=True)
    outcome = await rig.command(CommandKind.FREEZE)
    assert outcome.error is not None
    assert (outcome.state, outcome.error.message) == (ModelState.DOZING, "it was busy")
    assert rig.worker.ledger.reserved_bytes == FIXED_BYTES
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE
    assert engine_pid(rig) == pid


async def test_a_freeze_that_the_process_does_not_survive_leaves_nothing(
    rig: Rig, freezer: TroubledFreezer
) -> None:
    await rig.command(CommandKind.ACTIVATE)
    pid = engine_pid(rig)
    freezer.freeze_error = PrismError(ErrorCode.ENGINE_LOST, "neither here nor there", retry=True)
    outcome = await rig.command(CommandKind.FREEZE)
    assert outcome.state is ModelState.COLD
    assert not psutil.pid_exists(pid)
    assert rig.worker.ledger.reserved_bytes == 0


async def test_memory_that_stays_although_frozen_is_not_believed_to_be_free(
    rig: Rig, device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism.gpu_worker.counted_memory.FREED_DEADLINE_S", 0.05)
    await rig.command(CommandKind.ACTIVATE)
    device.holds_on = True
    outcome = await rig.command(CommandKind.FREEZE)
    assert outcome.error is not None
    assert f"{FIXED_BYTES} bytes are still mapped" in outcome.error.message
    assert rig.worker.instances[SMALL].engine is None
    assert rig.worker.ledger.reserved_bytes == 0


@pytest.mark.parametrize("kind", [CommandKind.ACTIVATE, CommandKind.DOZE])
async def test_a_thaw_that_fails_discards_the_engine_and_the_next_start_is_a_fresh_one(
    rig: Rig, freezer: TroubledFreezer, kind: CommandKind
) -> None:
    await frozen(rig)
    pid = engine_pid(rig)
    freezer.thaw_error = PrismError(ErrorCode.ENGINE_LOST, "restoring failed", retry=True)
    outcome = await rig.command(kind)
    assert outcome.error is not None
    assert (outcome.state, outcome.error.retry) == (ModelState.COLD, True)
    assert not psutil.pid_exists(pid)
    assert rig.worker.ledger.reserved_bytes == 0
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE


async def test_a_model_without_room_to_thaw_stays_frozen(rig: Rig) -> None:
    await frozen(rig)
    rig.worker.ledger.reserve("somebody else", kv=LIMIT_BYTES - KV_BYTES)
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.OUT_OF_MEMORY
    assert outcome.state is ModelState.FROZEN
    rig.worker.ledger.release("somebody else")
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE


async def test_a_frozen_model_can_be_released_and_lost(rig: Rig) -> None:
    await frozen(rig)
    pid = engine_pid(rig)
    assert (await rig.command(CommandKind.RELEASE)).state is ModelState.COLD
    assert not psutil.pid_exists(pid)
    await frozen(rig)
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    engine.kill()
    await rig.until_state(ModelState.COLD)


async def test_freezing_the_simulated_device_takes_what_it_is_told_to() -> None:
    async with simulated_device(SimulatedCosts(freeze_ms=3, thaw_ms=2)) as simulated:
        made: Freezer = simulated.freezer
        assert await made.freeze(1, 1.0) == {"checkpoint": 0.003}
        assert await made.thaw(1, 1.0) == {"restore": 0.002}


@pytest.mark.engine
async def test_the_cpu_device_says_that_it_cannot_and_leaves_the_model_as_it_is(
    session_nats: NatsServer, module_store: Path, shells: ForkServerShells, tiny_models: dict[str, Path]
) -> None:
    async with worker_rig(session_nats, module_store, shells, tiny_models) as rig:
        await rig.command(CommandKind.ACTIVATE)
        outcome = await rig.command(CommandKind.FREEZE)
        assert outcome.error is not None
        assert outcome.error.code is ErrorCode.UNSUPPORTED
        assert "no CUDA context" in outcome.error.message
        assert outcome.state is ModelState.ACTIVE
        assert len(tokens_of(await (await send(rig, "a", PROMPT, 4)).all())) == 4
