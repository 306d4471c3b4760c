"""What an engine's GPU memory consists of, noted stage by stage when PRISM_TRACE_FOOTPRINT is set.

Lines of the log that `prism.bench.activation` reads.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

VARIABLE = "PRISM_TRACE_FOOTPRINT"
MIB = 1 << 20
# SGLang's steps that allocate, by the stage that is noted after each.
SGLANG_STEPS = {
    "init_torch_distributed": "process_group",
    "load_model": "weights",
    "init_memory_pool": "kv_pool",
    "init_attention_backends": "attention",
    "init_cuda_graphs": "graphs",
}


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


def follow(owner: Any, steps: dict[str, str]) -> None:
    """Have a stage noted after each of the methods of class `owner` that `steps` names; what it lacks is
    passed over: it is another version's."""
    if not enabled():
        return
    for method, stage in steps.items():
        original = getattr(owner, method, None)
        if original is not None:
            setattr(owner, method, _noting(original, stage))


def _noting(original: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        note(stage)
        return result

    return noted
