"""The NVIDIA driver: whether it answers, what GPUs it lists, what its API can do."""

import ctypes
from collections.abc import Callable
from typing import Any

from prism.gpu_worker.doctor.findings import Finding, Verdict

MIB = 1 << 20
LIBRARY = "libcuda.so.1"
CHECKPOINT_CALL = "cuCheckpointProcessLock"
# What the pinned torch is built for, as cuDriverGetVersion counts.
LEAST_CUDA = 13_000
# Hopper and newer; what is older was not tried.
TRIED_CAPABILITY = (9, 0)


def load_nvml() -> Any:
    """pynvml, or None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def check_gpus(nvml: Any) -> list[Finding]:
    """The driver's version and each GPU, by `nvml` (the module pynvml, or None)."""
    if nvml is None:
        fix = "install nvidia-ml-py: make setup PROFILE=gpu"
        return [Finding("driver", Verdict.MISSING, "pynvml is not installed", fix, essential=True)]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        fix = "install NVIDIA's driver 580 or newer; in a container: --gpus all"
        return [Finding("driver", Verdict.MISSING, f"no driver answers ({error})", fix, essential=True)]
    try:
        findings = [Finding("driver", Verdict.OK, str(nvml.nvmlSystemGetDriverVersion()))]
        count = nvml.nvmlDeviceGetCount()
        if not count:
            fix = "let the container see a GPU (--gpus all), or use --device cpu"
            findings.append(Finding("GPUs", Verdict.MISSING, "none", fix, essential=True))
        return findings + [_gpu(nvml, index) for index in range(count)]
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Finding:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
    others = len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    free, total = int(memory.free) // MIB, int(memory.total) // MIB
    found = f"{nvml.nvmlDeviceGetName(handle)}, {free:,} of {total:,} MiB free, {others} processes"
    if capability < TRIED_CAPABILITY:
        fix = f"compute capability {capability[0]}.{capability[1]} was never tried; 9.0 was"
        return Finding(f"GPU {index}", Verdict.NOTE, found, fix)
    return Finding(f"GPU {index}", Verdict.OK, found)


def largest_gpu_bytes(nvml: Any) -> int:
    """Memory of the largest GPU; 0 without one, or without a driver."""
    if nvml is None:
        return 0
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return 0
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return max((int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles), default=0)
    finally:
        nvml.nvmlShutdown()


def check_driver_api(load: Callable[[str], Any] = ctypes.CDLL) -> list[Finding]:
    """The driver's API: recent enough for the CUDA that torch is built for, and able to freeze processes."""
    try:
        library = load(LIBRARY)
    except OSError as error:
        fix = "it comes with the driver; in a container: --gpus all"
        return [Finding("CUDA driver", Verdict.MISSING, str(error), fix, essential=True)]
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        fix = "is the driver's kernel module loaded? `nvidia-smi` says more"
        return [Finding("CUDA driver", Verdict.MISSING, "it does not tell its version", fix, essential=True)]
    major, minor = version.value // 1000, version.value % 1000 // 10
    found = f"CUDA {major}.{minor}"
    if version.value < LEAST_CUDA:
        fix = "torch here is built for CUDA 13: install driver 580 or newer"
        cuda = Finding("CUDA driver", Verdict.MISSING, found, fix, essential=True)
    else:
        cuda = Finding("CUDA driver", Verdict.OK, found)
    return [cuda, _freezing(library)]


def _freezing(library: Any) -> Finding:
    if getattr(library, CHECKPOINT_CALL, None) is None:
        fix = "driver 570 or newer has them; without, `freeze` is answered with unsupported"
        return Finding("freezing", Verdict.SLOW, "no cuCheckpointProcess* calls", fix)
    return Finding("freezing", Verdict.OK, "cuCheckpointProcess* calls are there")
