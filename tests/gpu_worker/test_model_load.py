"""What a load report says of a model on its way up, and what placement makes of it: simulated engines, each a
real process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.gpu_worker.worker_rig import KV_BYTES, SMALL, Rig, device_rig

from prism.cli.nats_server import NatsServer
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelSpec, ModelState
from prism.common.messages.placement import CommandKind
from prism.global_scheduler.cluster import ClusterState
from prism.gpu_worker.devices.simulated import SimulatedDevice, simulated_device
from prism.gpu_worker.devices.simulated_costs import SimulatedCosts
from prism.gpu_worker.shells import Shell, ShellSource
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.snapshot import InFlight

FIXED_BYTES = 1_000_000
LONG_MS = 600_000.0


class HeldShells:
    """Shells that nobody gets before `go` is set."""

    ready = True

    def __init__(self, inner: ShellSource) -> None:
        self._inner = inner
        self.go = asyncio.Event()

    async def take(self) -> Shell:
        """One of the inner ones."""
        await self.go.wait()
        return await self._inner.take()


@pytest.fixture
def start_ms() -> float:
    return 0.0


@pytest.fixture
async def device(start_ms: float) -> AsyncIterator[SimulatedDevice]:
    costs = SimulatedCosts(
        start_ms=start_ms, doze_ms=0, wake_ms=0, freeze_ms=0, thaw_ms=0, context_bytes=FIXED_BYTES
    )
    async with simulated_device(costs) as simulated:
        yield simulated


@pytest.fixture
async def rig(
    session_nats: NatsServer, module_store: Path, device: SimulatedDevice, tiny_models: dict[str, Path]
) -> AsyncIterator[Rig]:
    async with device_rig(session_nats, module_store, device, tiny_models) as ready:
        yield ready


def board_of(rig: Rig, report: LoadReport, *in_flight: InFlight) -> Board:
    """The cluster of this worker alone, as a scheduler sees it while those commands are on their way."""
    state = ClusterState()
    state.set_spec(SMALL, ModelSpec(SMALL, str(rig.models[SMALL])))
    state.set_facts(SMALL, rig.facts(SMALL))
    state.load(report, 0.0)
    return Board(state.snapshot(in_flight, 0.0), 0.0)


def activation(rig: Rig) -> InFlight:
    """The command that activates the model from where it is now, with what it will have reserved."""
    board = board_of(rig, rig.worker.load_report())
    fixed = board.fixed_bytes(board.snapshot.models[SMALL], board.snapshot.workers[0])
    return InFlight(rig.id, SMALL, CommandKind.ACTIVATE, fixed + KV_BYTES)


def assert_all_is_held(rig: Rig, report: LoadReport, command: InFlight) -> None:
    """What is reserved counts as held by the model, and is taken off what is free once."""
    (load,) = report.models
    held = rig.worker.ledger.held(SMALL)
    assert held.weights > 0
    assert (load.weights_bytes, load.kv_quota_bytes) == (held.weights + FIXED_BYTES, KV_BYTES)
    assert report.memory_reserved_bytes == held.total
    # Its checkpoint has a header, its weights have none: they are sized a little below the estimate.
    to_come = max(0, command.footprint_bytes - held.total)
    assert to_come < FIXED_BYTES / 10
    (gpu,) = board_of(rig, report, command).gpus
    assert gpu.free == gpu.unreserved == report.memory_limit_bytes - report.memory_reserved_bytes - to_come


async def test_while_it_is_staged_what_is_reserved_is_held(rig: Rig, device: SimulatedDevice) -> None:
    shells = device.shells = HeldShells(device.shells)
    command = activation(rig)
    activating = asyncio.create_task(rig.command(CommandKind.ACTIVATE))
    report = await rig.until_state(ModelState.STAGING)
    assert_all_is_held(rig, report, command)
    shells.go.set()
    assert (await activating).state is ModelState.ACTIVE


@pytest.mark.parametrize("start_ms", [LONG_MS])
async def test_while_it_starts_what_is_reserved_is_held(rig: Rig) -> None:
    command = activation(rig)
    activating = asyncio.create_task(rig.command(CommandKind.ACTIVATE))
    report = await rig.until_state(ModelState.STARTING)
    assert_all_is_held(rig, report, command)
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    engine.kill()
    assert (await activating).state is ModelState.COLD


@pytest.mark.parametrize("asleep", [CommandKind.DOZE, CommandKind.FREEZE])
async def test_while_it_wakes_what_is_reserved_is_held(
    rig: Rig, device: SimulatedDevice, asleep: CommandKind
) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert (await rig.command(asleep)).error is None
    command = activation(rig)
    turn = device.copying = asyncio.Semaphore(0)
    waking = asyncio.create_task(rig.command(CommandKind.ACTIVATE))
    report = await rig.until_state(ModelState.WAKING)
    assert_all_is_held(rig, report, command)
    turn.release()
    assert (await waking).state is ModelState.ACTIVE
    (load,) = (await rig.until_state(ModelState.ACTIVE)).models
    assert load.weights_bytes < rig.worker.ledger.held(SMALL).weights + FIXED_BYTES, "as counted again"
