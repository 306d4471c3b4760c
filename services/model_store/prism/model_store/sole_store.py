"""One store a socket, whatever happens: a lock that the kernel takes from a process that dies.

The socket alone can't tell. Two stores that find a dead one's at the same time would both replace it, and the
first would listen where nobody can connect; and between binding and listening it looks like a dead one's.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from prism.common.errors import ErrorCode, PrismError


@contextlib.contextmanager
def sole_store(socket_path: Path) -> Iterator[None]:
    """Be the only store that may listen on `socket_path`, until the end of the `with`.

    The lock's file lies beside the socket and stays there. Raises PrismError(store_unavailable) when another
    store has the lock, or the file can't be made.
    """
    lock_path = socket_path.with_name(socket_path.name + ".lock")
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o660)
    except OSError as error:
        raise unusable(socket_path, str(error)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrismError(
                ErrorCode.STORE_UNAVAILABLE,
                f"standby: another model store serves {socket_path}, and one is enough. This one ends; "
                "started again, as by a restart policy, it takes over when the other is gone "
                "(--socket or PRISM_STORE_SOCKET chooses another path)",
                retry=True,
            ) from error
        yield
    finally:
        os.close(descriptor)


def unusable(socket_path: Path, why: str) -> PrismError:
    """The error of a store that can't listen on `socket_path`."""
    return PrismError(
        ErrorCode.STORE_UNAVAILABLE,
        f"cannot listen on {socket_path}: {why}; --socket or PRISM_STORE_SOCKET chooses another path",
    )
