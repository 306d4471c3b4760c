"""What an engine's GPU memory consists of, noted stage by stage when PRISM_TRACE_FOOTPRINT is set.

Lines of the log that `prism.bench.activation` reads.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "PRISM_TRACE_FOOTPRINT"
MIB = 1 << 20
# Blocks that torch holds are listed at this stage, from this size.
LISTED_STAGE = "dozing"
LISTED_BYTES = 1 << 20
CALLERS = 6


def enabled() -> bool:
    """Whether stages are noted."""
    return bool(os.environ.get(VARIABLE))


def note(stage: str, log_at: Callable[[str], None] | None = None) -> None:
    """Note what the driver and torch count for this process now, if that is wanted."""
    if not enabled():
        return
    import torch

    reserved, used = 0, 0
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        reserved, used = torch.cuda.memory_reserved() // MIB, torch.cuda.memory_allocated() // MIB
    line = (
        f"footprint {stage}: {_driver_mib()} MiB by the driver, {reserved} reserved by torch, {used} in use"
    )
    (log_at or log.info)(line)
    if stage == LISTED_STAGE and torch.cuda.is_initialized():
        _list_blocks(log_at or log.info)


def record_allocations() -> None:
    """Have torch remember where it was asked for memory, if stages are noted: blocks are listed with it."""
    if enabled():
        import torch

        torch.cuda.memory._record_memory_history(stacks="python")


def _driver_mib() -> int:
    """Of all GPUs; -1 where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return -1
    try:
        used = 0
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                used += int(process.usedGpuMemory or 0) if process.pid == os.getpid() else 0
        return used // MIB
    finally:
        pynvml.nvmlShutdown()


def _list_blocks(log_at: Callable[[str], None]) -> None:
    """What torch still holds, largest first, with where in Python it was allocated."""
    import torch

    blocks = [
        (int(block["size"]), str(block["state"]), segment["segment_pool_id"], block.get("frames", []))
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if block["size"] >= LISTED_BYTES
    ]
    for size, state, pool, frames in sorted(blocks, key=lambda block: -block[0]):
        where = " < ".join(f"{Path(frame['filename']).name}:{frame['line']}" for frame in frames[:CALLERS])
        log_at(f"footprint block: {size / MIB:.1f} MiB {state}, pool {pool}, {where}")
