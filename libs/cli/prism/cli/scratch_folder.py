"""A temporary folder that goes away however its users end, killed ones included."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

REMOVE_DEADLINE_S = 15.0

# A shell waits for the end of a pipe that all users of the folder hold open: the kernel closes their ends, so
# it comes with the death of the last of them, and not before.
_REMOVE = (
    'while read -r _; do :; done; for _ in 1 2 3 4 5 6 7 8 9 10; do rm -rf -- "$1" && exit; sleep 1; done'
)


@dataclass(frozen=True)
class ScratchFolder:
    """The folder, and the file descriptor that each process which uses it must inherit."""

    path: Path
    users_fd: int


@contextmanager
def scratch_folder(prefix: str) -> Iterator[ScratchFolder]:
    """A folder that is gone when the block has ended, and soon after this process and all that inherited
    `users_fd` have died."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    watched, users = os.pipe()
    remover = subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE, "sh", str(path)],
        stdin=watched,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Not to be reached by a Ctrl-C at the terminal, nor to keep anything busy that is to be removed.
        start_new_session=True,
        cwd="/",
    )
    os.close(watched)
    try:
        yield ScratchFolder(path, users)
    finally:
        os.close(users)
        # Past that a process still uses it; it goes when that one does.
        with suppress(subprocess.TimeoutExpired):
            remover.wait(REMOVE_DEADLINE_S)
