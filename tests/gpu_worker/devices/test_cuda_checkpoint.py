"""Checkpoints by the driver's calls, with the driver stood in for where ctypes calls it."""

from types import SimpleNamespace
from typing import Any

import pytest
from tests.gpu_worker.devices.fake_libcuda import (
    CHECKPOINTED,
    FAILED,
    ILLEGAL_STATE,
    LOCKED,
    NO_DEVICE,
    NOT_READY,
    OUT_OF_MEMORY,
    RUNNING,
    FakeLibcuda,
)

from prism.gpu_worker.devices.cuda_checkpoint import (
    CheckpointDriver,
    CheckpointFailed,
    CheckpointUnsupported,
    ProcessState,
)

PID = 4711


def driver_of(cuda: FakeLibcuda) -> CheckpointDriver:
    return CheckpointDriver(lambda _: cuda)


def test_a_process_is_locked_checkpointed_restored_and_unlocked() -> None:
    cuda = FakeLibcuda(PID)
    driver = driver_of(cuda)
    assert driver.freeze(PID, 1500).keys() == {"lock", "checkpoint"}
    assert driver.state(PID) is ProcessState.CHECKPOINTED
    assert driver.thaw(PID).keys() == {"restore", "unlock"}
    assert driver.state(PID) is ProcessState.RUNNING
    assert cuda.calls == ["lock", "checkpoint", "restore", "unlock"]
    assert cuda.lock_timeouts_ms == [1500]


def test_a_process_that_is_busy_too_long_runs_on() -> None:
    cuda = FakeLibcuda(PID, failing={"lock": NOT_READY})
    with pytest.raises(CheckpointFailed, match=f"locking process {PID}: it was busy") as failure:
        driver_of(cuda).freeze(PID, 10)
    assert failure.value.runs
    assert cuda.states[PID] == RUNNING


def test_a_checkpoint_that_fails_takes_its_lock_back() -> None:
    cuda = FakeLibcuda(PID, failing={"checkpoint": OUT_OF_MEMORY})
    with pytest.raises(CheckpointFailed, match="CUDA_ERROR_OUT_OF_MEMORY") as failure:
        driver_of(cuda).freeze(PID, 10)
    assert failure.value.runs
    assert cuda.calls == ["lock", "checkpoint", "unlock"]


@pytest.mark.parametrize("left_in", [LOCKED, FAILED])
def test_a_process_that_cannot_be_unlocked_does_not_run(left_in: int) -> None:
    cuda = FakeLibcuda(PID, failing={"checkpoint": OUT_OF_MEMORY, "unlock": ILLEGAL_STATE})
    driver = driver_of(cuda)
    with pytest.raises(CheckpointFailed) as failure:
        driver.freeze(PID, 10)
    cuda.states[PID] = left_in
    assert not failure.value.runs
    assert driver.state(PID) is not ProcessState.RUNNING


def test_a_restore_that_fails_leaves_the_process_frozen() -> None:
    cuda = FakeLibcuda(PID)
    driver = driver_of(cuda)
    driver.freeze(PID, 10)
    cuda.failing["restore"] = OUT_OF_MEMORY
    with pytest.raises(CheckpointFailed, match=f"restoring process {PID}: CUDA_ERROR_OUT_OF_MEMORY") as lost:
        driver.thaw(PID)
    assert not lost.value.runs
    assert cuda.states[PID] == CHECKPOINTED


def test_a_process_that_is_gone_does_not_run() -> None:
    driver = driver_of(FakeLibcuda())
    assert driver.state(PID) is ProcessState.FAILED
    with pytest.raises(CheckpointFailed, match="CUDA_ERROR_INVALID_VALUE") as failure:
        driver.freeze(PID, 10)
    assert not failure.value.runs


def absent(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (absent, "no NVIDIA driver: libcuda.so.1"),
        (lambda _: SimpleNamespace(), "no checkpoint calls; 570 and newer do"),
        (lambda _: FakeLibcuda(failing={"init": NO_DEVICE}), "CUDA_ERROR_NO_DEVICE"),
    ],
    ids=["no driver", "an old one", "no GPU"],
)
def test_where_nothing_can_be_frozen_it_says_why(load: Any, reason: str) -> None:
    with pytest.raises(CheckpointUnsupported, match=reason):
        CheckpointDriver(load)
