"""Who runs where: from four cores on, one for the gateway, all others for everybody else.

With enough cores the load's processes would otherwise be woken on the gateway's and take it away after every
few tokens. With fewer, whatever shares the other one with the load suffers more than pinning gains.
"""

import contextlib
import os

import psutil

CORES_FOR_PINNING = 4
ALL = frozenset(os.sched_getaffinity(0))
PINNED = len(ALL) >= CORES_FOR_PINNING
OF_GATEWAY = frozenset({min(ALL)}) if PINNED else ALL
OF_OTHERS = ALL - OF_GATEWAY if PINNED else ALL


def leave_gateway_its_core() -> None:
    """Keep this process, and whatever it starts from now on, off the gateway's core."""
    os.sched_setaffinity(0, OF_OTHERS)


def give_gateway_its_core(gateway: psutil.Process) -> None:
    """Move all threads of `gateway` and its children to its core."""
    for process in [gateway, *gateway.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, OF_GATEWAY)
