"""The CPU: real SGLang engines with torch's own attention, float32, weights and KV cache in arenas."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from prism.gpu_worker.devices import arena_memory
from prism.gpu_worker.devices.freezing import Freezer, NoFreezer
from prism.gpu_worker.engine_protocol import EngineOptions, Ready
from prism.gpu_worker.shells import ShellSource, fork_server_shells

FLOAT32_BYTES = 4
MOST_COPY_THREADS = 8
COPIES_AT_ONCE = 64


class CpuDevice:
    """Engines on this host's CPU. An engine's fixed cost is host memory, not part of the worker's limit."""

    name = "cpu"
    element_bytes: int | None = FLOAT32_BYTES
    dtype = "float32"
    fixed_bytes = 0
    rank_counts: tuple[int, ...] = tuple(range(1, 9))
    profile = "cpu"
    default_memory_bytes = 4_000_000_000

    options = EngineOptions()

    def __init__(self, shells: ShellSource, options: EngineOptions | None = None) -> None:
        self.options = options or self.options
        self.shells: ShellSource = shells
        self.copying = asyncio.Semaphore(COPIES_AT_ONCE)
        self.copy_threads = min(MOST_COPY_THREADS, os.cpu_count() or 1)
        self.freezer: Freezer = NoFreezer("an engine on a CPU has no CUDA context to give up")

    def layout(self, tp_rank: int, tp_size: int) -> str:
        """Engine, version, dtype and rank: an image of any other is not ours to use."""
        return f"sglang-{version('sglang')}/cpu/{self.dtype}/tp{tp_rank}of{tp_size}"

    def resident_bytes(self, pid: int, ready: Ready) -> tuple[int, int]:
        """As the kernel counts it."""
        return arena_memory.resident_bytes(pid, ready)

    def left_bytes(self, pid: int, ready: Ready) -> int:
        """Everything that is still there."""
        return arena_memory.left_bytes(pid, ready)

    def held_bytes(self, pid: int, ready: Ready) -> int:
        """The same: nothing is fixed."""
        return arena_memory.left_bytes(pid, ready)


@asynccontextmanager
async def cpu_device(options: EngineOptions) -> AsyncIterator[CpuDevice]:
    """The CPU with warm shells on the way."""
    async with fork_server_shells() as shells:
        yield CpuDevice(shells, options)
