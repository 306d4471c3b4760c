"""What a benchmark's processes hold of GPUs that others use too; NVML is stood in for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from prism.bench.gpu_processes import engine_pid, gpu_environment, gpu_used_bytes

# A worker and its engine, which says its process id and waits for the end of its input.
WORKER = """
import subprocess, sys
engine = '''
import os, sys, setproctitle
setproctitle.setproctitle("prism-engine small")
print(os.getpid(), flush=True)
sys.stdin.read()
'''
sys.exit(subprocess.call([sys.executable, "-c", engine]))
"""


@pytest.fixture
def engine() -> Iterator[int]:
    """The process id of an engine that a process of ours has started."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdin is not None
        yield int(worker.stdout.readline())
        worker.stdin.close()
        assert worker.wait(30) == 0


def test_an_engine_is_found_by_its_model(engine: int) -> None:
    assert engine_pid("small") == engine
    with pytest.raises(LookupError, match="large"):
        engine_pid("large")


def test_what_others_hold_is_not_counted(engine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    others = os.getppid()
    held = {0: [(engine, 100), (others, 7)], 1: [(engine, 20)]}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(held),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda index: [
            SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in held[index]
        ],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_used_bytes() == {engine: 120}


def test_what_is_compared_runs_on_the_gpu_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRISM_GPU", raising=False)
    assert gpu_environment() == {}
    monkeypatch.setenv("PRISM_GPU", "1")
    assert gpu_environment() == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
