"""GPU memory as the driver counts it, per GPU and process, without a CUDA context of one's own."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pynvml

from prism.common.errors import ErrorCode, PrismError


class GpuMemory:
    """One GPU of this machine. Made by `gpu_memory`; sizes are bytes."""

    def __init__(self, index: int) -> None:
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.uuid = str(pynvml.nvmlDeviceGetUUID(self._handle))
        self.name = str(pynvml.nvmlDeviceGetName(self._handle))
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(self._handle)
        self.compute_capability = f"{major}{minor}"

    @property
    def total_bytes(self) -> int:
        """All of its memory."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    @property
    def free_bytes(self) -> int:
        """What nobody has taken."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).free)

    def used_by(self, pid: int) -> int:
        """What the process holds, its context included; 0 if it has none here. Raises PrismError(internal)
        when the driver does not tell."""
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError as error:
            raise PrismError(
                ErrorCode.INTERNAL, f"the driver does not tell what processes hold on {self.name}: {error}"
            ) from error
        return sum(int(process.usedGpuMemory or 0) for process in processes if process.pid == pid)


def gpu_uuids() -> list[str]:
    """All GPUs of this machine that answer, within a `gpu_memory`."""
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError):
            found.append(str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))))
    return found


@contextmanager
def gpu_memory(index: int) -> Iterator[GpuMemory]:
    """The GPU that the driver lists as `index`. Raises PrismError(invalid_request) when there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"no NVIDIA driver answers ({error}); is this a GPU host, and does the container see its GPUs? "
            "--device cpu runs without one",
        ) from error
    try:
        count = pynvml.nvmlDeviceGetCount()
        if index >= count:
            raise PrismError(
                ErrorCode.INVALID_REQUEST,
                f"there is no GPU {index}: the driver lists {count}, from 0 on",
            )
        yield GpuMemory(index)
    finally:
        pynvml.nvmlShutdown()
