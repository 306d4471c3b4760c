"""libcuda as ctypes shows it, as far as checkpoints go: processes, and the states that they are in."""

import ctypes
from typing import Any

INVALID_VALUE = 1
NO_DEVICE = 100
ILLEGAL_STATE = 401
NOT_READY = 600
OUT_OF_MEMORY = 2
NAMES = {
    INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE",
    OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY",
    NO_DEVICE: b"CUDA_ERROR_NO_DEVICE",
    ILLEGAL_STATE: b"CUDA_ERROR_ILLEGAL_STATE",
}
RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)


class FakeLibcuda:
    """`states` holds what each known process is in; a call named in `failing` answers its status instead."""

    def __init__(self, *pids: int, failing: dict[str, int] | None = None) -> None:
        self.states = dict.fromkeys(pids, RUNNING)
        self.failing = failing or {}
        self.calls: list[str] = []
        self.lock_timeouts_ms: list[int] = []

    def cuInit(self, flags: int) -> int:
        return self.failing.get("init", 0)

    def cuGetErrorName(self, status: int, name: Any) -> int:
        ctypes.cast(name, ctypes.POINTER(ctypes.c_char_p))[0] = NAMES.get(status)
        return 0

    def cuCheckpointProcessGetState(self, pid: int, state: Any) -> int:
        if pid not in self.states:
            return INVALID_VALUE
        ctypes.cast(state, ctypes.POINTER(ctypes.c_int))[0] = self.states[pid]
        return 0

    def _pass(self, call: str, pid: int, before: int, after: int) -> int:
        self.calls.append(call)
        if call in self.failing:
            return self.failing[call]
        if self.states.get(pid) != before:
            return ILLEGAL_STATE if pid in self.states else INVALID_VALUE
        self.states[pid] = after
        return 0

    def cuCheckpointProcessLock(self, pid: int, arguments: Any) -> int:
        # Eight words of which only the first half of the first may be set.
        words = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_uint64))[:8]
        assert words[0] < 1 << 32
        assert words[1:] == [0] * 7
        self.lock_timeouts_ms.append(words[0])
        return self._pass("lock", pid, RUNNING, LOCKED)

    def cuCheckpointProcessCheckpoint(self, pid: int, arguments: Any) -> int:
        assert ctypes.cast(arguments, ctypes.POINTER(ctypes.c_uint64))[:8] == [0] * 8
        return self._pass("checkpoint", pid, LOCKED, CHECKPOINTED)

    def cuCheckpointProcessRestore(self, pid: int, arguments: Any) -> int:
        assert ctypes.cast(arguments, ctypes.POINTER(ctypes.c_uint64))[:8] == [0] * 8
        return self._pass("restore", pid, CHECKPOINTED, LOCKED)

    def cuCheckpointProcessUnlock(self, pid: int, arguments: Any) -> int:
        assert ctypes.cast(arguments, ctypes.POINTER(ctypes.c_uint64))[:8] == [0] * 8
        return self._pass("unlock", pid, LOCKED, RUNNING)
