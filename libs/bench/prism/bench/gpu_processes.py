"""The GPU of a benchmark, and what its processes hold there. Benchmarks on other GPUs may run beside it."""

import os
from collections import Counter
from collections.abc import Iterator

import psutil

WORKER_GPU = "PRISM_GPU"


def gpu_environment() -> dict[str, str]:
    """Variables that have a process compute on the GPUs that workers are told to use, if any are named."""
    gpus = os.environ.get(WORKER_GPU)
    # As nvidia-smi numbers them; CUDA would put the fastest first.
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus} if gpus else {}


def gpu_used_bytes() -> dict[int, int]:
    """GPU memory by process of this benchmark, of all GPUs, as the driver counts it."""
    # It is installed where GPUs are; elsewhere cells without one are run all the same.
    import pynvml

    pynvml.nvmlInit()
    ours = {process.pid for process in _processes()}
    used: Counter[int] = Counter()
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid in ours:
                used[int(process.pid)] += int(process.usedGpuMemory or 0)
    return used


def engine_pid(model: str) -> int:
    """The process of this benchmark that hosts `model`. Raises LookupError."""
    for process in _processes():
        try:
            title = " ".join(process.cmdline()).strip()
        except psutil.Error:
            continue
        if title == f"prism-engine {model}":
            return int(process.pid)
    raise LookupError(f"no engine of {model}")


def _processes() -> Iterator[psutil.Process]:
    """All that this process has started, and what those have."""
    yield from psutil.Process().children(recursive=True)
