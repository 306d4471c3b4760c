"""The files in shared memory in which kvcached tells other processes how full an engine's KV pool is.

kvcached makes one per process and leaves it to the interpreter's end to remove it, which an engine doesn't
have: it ends at once, or is killed.
"""

from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
"""Where kvcached has them."""


def segment_name(shell_pid: int, rank: int) -> str:
    """The segment of a rank of the shell with that process id."""
    return f"prism-{shell_pid}-{rank}" if rank else f"prism-{shell_pid}"


def remove_segments(shell_pid: int) -> None:
    """Remove those of a shell that has ended, of all its ranks."""
    own = SHARED_MEMORY / segment_name(shell_pid, 0)
    for path in (own, *SHARED_MEMORY.glob(f"{own.name}-*")):
        path.unlink(missing_ok=True)
