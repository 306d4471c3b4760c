"""What doctor says of the driver; only NVML and libcuda themselves are stood in for."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from prism.gpu_worker.doctor.driver import check_driver_api, check_gpus, largest_gpu_bytes
from prism.gpu_worker.doctor.findings import Verdict, fails

GIB = 1 << 30


class FakeNvml:
    """NVML as pynvml shows it: `gpus` as (name, total bytes, free bytes, compute capability)."""

    class NVMLError(Exception):
        """What every call of it raises."""

    def __init__(self, gpus: list[tuple[str, int, int, tuple[int, int]]], *, answers: bool = True) -> None:
        self.gpus = gpus
        self.answers = answers
        self.open = 0

    def nvmlInit(self) -> None:
        if not self.answers:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.gpus[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        _, total, free, _ = self.gpus[handle]
        return SimpleNamespace(total=total, free=free)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return self.gpus[handle][3]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[int]:
        return [1]


def test_each_gpu_is_told_with_its_memory_and_nvml_is_let_go() -> None:
    nvml = FakeNvml([("NVIDIA H200", 140 * GIB, 130 * GIB, (9, 0)), ("Old", 8 * GIB, 8 * GIB, (7, 0))])
    driver, first, second = check_gpus(nvml)
    assert (driver.verdict, driver.found) == (Verdict.OK, "580.65.06")
    assert first.found == "NVIDIA H200, 133,120 of 143,360 MiB free, 1 processes"
    assert second.verdict is Verdict.NOTE
    assert "7.0 was never tried" in second.fix
    assert largest_gpu_bytes(nvml) == 140 * GIB
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("nvml", "found"),
    [
        (None, "pynvml is not installed"),
        (FakeNvml([], answers=False), "Driver Not Loaded"),
        (FakeNvml([]), "none"),
    ],
)
def test_without_a_gpu_it_says_why_and_how_to_fix_it(nvml: Any, found: str) -> None:
    findings = check_gpus(nvml)
    assert fails(findings)
    last = findings[-1]
    assert found in last.found
    assert last.fix
    assert largest_gpu_bytes(nvml) == 0


def library(version: int, *, status: int = 0, **calls: Callable[..., int]) -> SimpleNamespace:
    """A libcuda that tells `version`."""

    def tell(into: Any) -> int:
        ctypes.cast(into, ctypes.POINTER(ctypes.c_int))[0] = version
        return status

    return SimpleNamespace(cuDriverGetVersion=tell, **calls)


def test_a_recent_driver_that_can_freeze_is_fine() -> None:
    found = library(13000, cuCheckpointProcessLock=lambda *_: 0)
    cuda, freezing = check_driver_api(lambda _: found)
    assert (cuda.verdict, cuda.found) == (Verdict.OK, "CUDA 13.0")
    assert freezing.verdict is Verdict.OK


def test_an_old_driver_is_not_enough_and_cannot_freeze() -> None:
    cuda, freezing = check_driver_api(lambda _: library(12040))
    assert (cuda.verdict, cuda.found, cuda.essential) == (Verdict.MISSING, "CUDA 12.4", True)
    assert freezing.verdict is Verdict.SLOW
    assert not freezing.essential


def test_a_driver_that_does_not_answer_or_is_not_there_is_missing() -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert fails(check_driver_api(absent))
    assert fails(check_driver_api(lambda _: library(0, status=3)))
