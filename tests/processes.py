"""Looking at processes that may end, or be reaped, while they are looked at."""

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """The command line of `process`, or what it has written over it; empty once it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below `pid` now; none if there is no such process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
