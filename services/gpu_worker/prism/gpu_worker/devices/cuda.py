"""NVIDIA GPUs: SGLang engines with CUDA graphs and kvcached; the driver tells what memory they hold."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

from prism.gpu_worker.devices.checkpoint_process import checkpoint_process
from prism.gpu_worker.devices.freezing import Freezer
from prism.gpu_worker.devices.gpu_kind import profile_of
from prism.gpu_worker.devices.gpu_memory import GpuMemory, gpu_memory, gpu_uuids
from prism.gpu_worker.engine_protocol import EngineDevice, EngineOptions, Ready
from prism.gpu_worker.lent_bus.lender_process import LentBus, lent_bus
from prism.gpu_worker.shells import ShellSource
from prism.gpu_worker.warm_shells import WarmShells, warm_shells

MIB = 1 << 20
SHELL_MODULE = "prism.gpu_worker.engine.cuda_shell"
# A context with cuBLAS, graphs, SGLang's buffers and torch's cache: an 8B model's take 738 MiB, those of one
# with 80 layers about 200 more (docs/gpu.md).
FIXED_BYTES = 1024 * MIB
# NCCL's and SGLang's buffers for all-reduce, of each rank of an engine on several GPUs (measured on two).
RANKS_BYTES = 1536 * MIB
# Raised when tensors come to lie elsewhere in an arena: images made before must not be taken for it.
ARENA_VERSION = 3
# The context of a process that lends the bus.
LENDER_BYTES = 512 * MIB
ACTIVATION_SLACK_BYTES = 4096 * MIB
MOST_COPY_THREADS = 16


class CudaDevice:
    """Engines on one GPU, or on several that each engine has a rank on. `memories` is what the driver counts
    there; sizes are those of one GPU, and all have the same."""

    name = "cuda"
    element_bytes: int | None = None
    dtype = "auto"

    def __init__(
        self,
        memories: Sequence[GpuMemory],
        shells: WarmShells,
        freezer: Freezer,
        options: EngineOptions,
        bus: LentBus | None = None,
    ) -> None:
        self.memories = list(memories)
        self.rank_counts: tuple[int, ...] = (len(self.memories),)
        self.fixed_bytes = FIXED_BYTES + (RANKS_BYTES if len(self.memories) > 1 else 0)
        self.profile = profile_of(self.memories[0].name)
        self.shells: ShellSource = shells
        self.freezer = freezer
        self.copying: AbstractAsyncContextManager[object] = bus or asyncio.Semaphore(1)
        self.copy_threads = min(MOST_COPY_THREADS, os.cpu_count() or 1)
        self.options = options
        self.default_memory_bytes = min(memory.total_bytes for memory in memories) - ACTIVATION_SLACK_BYTES
        if bus is not None:
            self.default_memory_bytes -= LENDER_BYTES

    def layout(self, tp_rank: int, tp_size: int) -> str:
        """Engine, version, kind of GPU, dtype and rank: an image of any other is not ours to use."""
        device = f"sm{self.memories[0].compute_capability}"
        engine = f"sglang-{version('sglang')}/{device}/{self.dtype}"
        return f"{engine}/tp{tp_rank}of{tp_size}/arena{ARENA_VERSION}"

    def resident_bytes(self, pid: int, ready: Ready) -> tuple[int, int]:
        """What the driver counts beyond the engine's fixed cost, where that is most: weights first, the rest
        is KV cache."""
        beyond = self.left_bytes(pid, ready)
        weights = min(beyond, ready.weights_bytes)
        return weights, beyond - weights

    def left_bytes(self, pid: int, ready: Ready) -> int:
        """What the driver counts for the engine beyond its fixed cost, on the GPU where that is most."""
        return max(0, max(self._used(pid, ready)) - self.fixed_bytes)

    def held_bytes(self, pid: int, ready: Ready) -> int:
        """All that the driver counts for the engine."""
        return sum(self._used(pid, ready))

    def _used(self, pid: int, ready: Ready) -> list[int]:
        pids = [pid, *(rank.pid for rank in ready.ranks)]
        return [memory.used_by(each) for memory, each in zip(self.memories, pids, strict=False)]


@asynccontextmanager
async def cuda_device(
    indices: Sequence[int],
    *,
    warm: int,
    attention_backend: str,
    decode_graph_sizes: Sequence[int],
    defer_graphs: bool,
    wake_lead_s: float,
    lent_buses: Path | None,
) -> AsyncIterator[CudaDevice]:
    """GPUs `indices` of this machine, with `warm` shells, each on all of them, kept for the next models. With
    a folder `lent_buses` a single one lends its bus there while nothing is woken on it, and borrows others'.
    """
    if len(indices) > 1:
        lent_buses = None
    with ExitStack() as opened:
        memories = [opened.enter_context(gpu_memory(index)) for index in indices]
        own = [memory.uuid for memory in memories]
        options = EngineOptions(
            EngineDevice.CUDA,
            attention_backend,
            sorted(set(decode_graph_sizes)),
            defer_graphs,
            prime=True,
            wake_lead_s=wake_lead_s,
            lent_buses=str(lent_buses or ""),
            own_gpus=own,
        )
        visible = ",".join(own)
        environment = {"CUDA_VISIBLE_DEVICES": visible, "PRISM_RANKS": str(len(memories))}
        async with (
            warm_shells(SHELL_MODULE, warm, environment) as shells,
            checkpoint_process(environment) as freezer,
            _lent(lent_buses, own[0]) as bus,
        ):
            yield CudaDevice(memories, shells, freezer, options, bus)


def _lent(folder: Path | None, own: str) -> AbstractAsyncContextManager[LentBus | None]:
    if folder is None:
        return nullcontext()
    others = [uuid for uuid in gpu_uuids() if uuid != own]
    return lent_bus(folder / own, {"CUDA_VISIBLE_DEVICES": ",".join([own, *others])})
