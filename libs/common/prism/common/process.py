"""The frame of every service process: uvloop, signals, orderly end, death with the launcher."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator

from prism.common.errors import PrismError

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


def die_with_parent(deadly: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `deadly` to this process when the thread that started it ends (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(deadly), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def run_service(name: str, serve: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `serve(stop)` until it returns; SIGTERM and SIGINT set `stop`, a second one ends at once.

    Returns the exit status: 0, or 1 after a PrismError, told in one line. When the environment names
    PRISM_PARENT_PID, the service also ends (as by SIGTERM) with that process.
    """
    parent = os.environ.get("PRISM_PARENT_PID")
    if parent is not None:
        die_with_parent()
        if os.getppid() != int(parent):
            return 0

    async def main() -> int:
        stop = asyncio.Event()
        status = 0

        def on_signal() -> None:
            if stop.is_set():
                log.warning("%s: ended at once by a second signal", name)
                os._exit(130)
            stop.set()

        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, on_signal)
        try:
            await serve(stop)
        except* PrismError as errors:
            for error in _leaves(errors):
                log.error("%s", error)
            status = 1
        return status

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main())


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def exit_with(status: int) -> None:
    """End the process with `status` after flushing what was printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
