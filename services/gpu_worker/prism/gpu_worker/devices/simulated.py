"""The simulated device: engines that compute nothing, for tests of load and scheduling alone.

Its name stands in load reports, in the metadata of the micro service and in `/v1/models`, so that nobody
takes what it says, or how fast, for a model's doing.
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from prism.gpu_worker.devices import arena_memory
from prism.gpu_worker.devices.freezing import Freezer, SimulatedFreezer
from prism.gpu_worker.devices.simulated_costs import SimulatedCosts
from prism.gpu_worker.engine_protocol import EngineOptions, Ready
from prism.gpu_worker.shells import ShellSource
from prism.gpu_worker.started_shells import StartedShells, started_shells

log = logging.getLogger(__name__)

COPIES_AT_ONCE = 64
ENGINE_MODULE = "prism.gpu_worker.devices.simulated_engine"


class SimulatedDevice:
    """Engines that sleep by a cost model. Their weights are a copy of the checkpoint as it is."""

    name = "simulated"
    element_bytes: int | None = None
    dtype = "auto"
    fixed_bytes: int
    rank_counts: tuple[int, ...] = (1,)
    profile = ""
    options = EngineOptions()
    default_memory_bytes = 4_000_000_000
    copy_threads = 1

    def __init__(self, shells: StartedShells, costs: SimulatedCosts) -> None:
        self.shells: ShellSource = shells
        self.fixed_bytes = costs.context_bytes
        self.freezer: Freezer = SimulatedFreezer(costs.freeze_ms / 1000, costs.thaw_ms / 1000)
        self.copying = asyncio.Semaphore(COPIES_AT_ONCE)

    def layout(self, tp_rank: int, tp_size: int) -> str:
        """Never deposited: these engines take the checkpoint."""
        return f"simulated/tp{tp_rank}of{tp_size}"

    def resident_bytes(self, pid: int, ready: Ready) -> tuple[int, int]:
        """As the kernel counts it."""
        return arena_memory.resident_bytes(pid, ready)

    def left_bytes(self, pid: int, ready: Ready) -> int:
        """Everything that is still there."""
        return arena_memory.left_bytes(pid, ready)

    def held_bytes(self, pid: int, ready: Ready) -> int:
        """The same: a context is only counted, there is none."""
        return arena_memory.left_bytes(pid, ready)


@asynccontextmanager
async def simulated_device(costs: SimulatedCosts) -> AsyncIterator[SimulatedDevice]:
    """The device; `costs` are those of all its engines."""
    shown = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(costs).items())
    log.warning("SIMULATED device: engines compute nothing and say numbers (%s)", shown)
    async with started_shells(ENGINE_MODULE, [msgspec.json.encode(costs).decode()]) as shells:
        yield SimulatedDevice(shells, costs)
