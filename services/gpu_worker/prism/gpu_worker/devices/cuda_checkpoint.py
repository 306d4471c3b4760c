"""Checkpoints of a process's CUDA state by the driver (cuCheckpointProcess*, driver 570 and newer).

The driver copies what the process has on its GPUs into host memory of that process and lets go of the GPUs;
restoring puts it back under the same addresses, so that CUDA graphs stay valid. The process itself runs on,
only its CUDA calls wait.
"""

import ctypes
import enum
import time
from collections.abc import Callable
from typing import Any

LIBRARY = "libcuda.so.1"
SUCCESS = 0
NOT_READY = 600


class ProcessState(enum.IntEnum):
    """CUprocessState."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


class LockArgs(ctypes.Structure):
    """CUcheckpointLockArgs."""

    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


class OtherArgs(ctypes.Structure):
    """CUcheckpointCheckpointArgs, CUcheckpointRestoreArgs and CUcheckpointUnlockArgs: 64 bytes of zero."""

    _fields_ = (("reserved", ctypes.c_uint64 * 8),)


class CheckpointUnsupported(Exception):
    """This driver, or this host, cannot checkpoint processes; says why."""


class CheckpointFailed(Exception):
    """A checkpoint or a restore did not come about. `runs` tells whether the process goes on as before."""

    def __init__(self, message: str, *, runs: bool) -> None:
        super().__init__(message)
        self.runs = runs


class CheckpointDriver:
    """The driver's checkpoint calls. `library` is libcuda as ctypes loads it.

    Raises CheckpointUnsupported. Makes no CUDA context: the process that uses this holds no GPU memory.
    """

    def __init__(self, load: Callable[[str], Any] = ctypes.CDLL) -> None:
        try:
            self._cuda = load(LIBRARY)
        except OSError as error:
            raise CheckpointUnsupported(f"no NVIDIA driver: {error}") from error
        if getattr(self._cuda, "cuCheckpointProcessLock", None) is None:
            raise CheckpointUnsupported("this NVIDIA driver has no checkpoint calls; 570 and newer do")
        status = self._cuda.cuInit(0)
        if status != SUCCESS:
            raise CheckpointUnsupported(f"the NVIDIA driver does not start: {self._name(status)}")

    def state(self, pid: int) -> ProcessState:
        """How the process stands; FAILED where the driver can't say."""
        state = ctypes.c_int(-1)
        if self._cuda.cuCheckpointProcessGetState(pid, ctypes.byref(state)) != SUCCESS:
            return ProcessState.FAILED
        try:
            return ProcessState(state.value)
        except ValueError:
            return ProcessState.FAILED

    def freeze(self, pid: int, lock_timeout_ms: int) -> dict[str, float]:
        """Lock and checkpoint; returns the seconds of each. A lock without a checkpoint is taken back.

        Raises CheckpointFailed.
        """
        began = time.perf_counter()
        lock = LockArgs(timeout_ms=lock_timeout_ms)
        status = self._cuda.cuCheckpointProcessLock(pid, ctypes.byref(lock))
        if status != SUCCESS:
            why = "it was busy" if status == NOT_READY else self._name(status)
            raise CheckpointFailed(f"locking process {pid}: {why}", runs=self._runs(pid))
        locked = time.perf_counter()
        status = self._cuda.cuCheckpointProcessCheckpoint(pid, ctypes.byref(OtherArgs()))
        if status != SUCCESS:
            self._cuda.cuCheckpointProcessUnlock(pid, ctypes.byref(OtherArgs()))
            raise CheckpointFailed(f"checkpointing process {pid}: {self._name(status)}", runs=self._runs(pid))
        return {"lock": locked - began, "checkpoint": time.perf_counter() - locked}

    def thaw(self, pid: int) -> dict[str, float]:
        """Restore and unlock; returns the seconds of each. Raises CheckpointFailed."""
        began = time.perf_counter()
        status = self._cuda.cuCheckpointProcessRestore(pid, ctypes.byref(OtherArgs()))
        if status != SUCCESS:
            raise CheckpointFailed(f"restoring process {pid}: {self._name(status)}", runs=self._runs(pid))
        restored = time.perf_counter()
        status = self._cuda.cuCheckpointProcessUnlock(pid, ctypes.byref(OtherArgs()))
        if status != SUCCESS:
            raise CheckpointFailed(f"unlocking process {pid}: {self._name(status)}", runs=self._runs(pid))
        return {"restore": restored - began, "unlock": time.perf_counter() - restored}

    def _runs(self, pid: int) -> bool:
        return self.state(pid) is ProcessState.RUNNING

    def _name(self, status: int) -> str:
        name = ctypes.c_char_p()
        self._cuda.cuGetErrorName(status, ctypes.byref(name))
        return name.value.decode() if name.value else f"CUDA error {status}"
