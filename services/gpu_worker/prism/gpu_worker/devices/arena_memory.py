"""Memory of engines that keep weights and KV cache in shared memory: what the kernel counts behind each."""

import os

from prism.gpu_worker.engine_protocol import Ready


def resident_bytes(pid: int, ready: Ready) -> tuple[int, int]:
    """Bytes behind weights and KV cache of a live engine now."""
    weights, kv = _bytes_of(pid, ready.weights_fd), _bytes_of(pid, ready.kv_fd)
    weights += sum(_bytes_of(rank.pid, rank.weights_fd) for rank in ready.ranks)
    return weights, kv + sum(_bytes_of(rank.pid, rank.kv_fd) for rank in ready.ranks)


def left_bytes(pid: int, ready: Ready) -> int:
    """What a dozing engine still holds that it should not."""
    return sum(resident_bytes(pid, ready))


def _bytes_of(pid: int, fd: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/fd/{fd}").st_blocks * 512
    except OSError:
        return 0
