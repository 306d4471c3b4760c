"""The worker's side of its lender: a process that lends the bus of its GPU while nothing is woken there."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType

from prism.gpu_worker.child_process import end_child
from prism.gpu_worker.lent_bus.lender import KEEP, SPARE

log = logging.getLogger(__name__)

START_DEADLINE_S = 30.0
EXIT_DEADLINE_S = 5.0
LENDER = (sys.executable, "-m", "prism.gpu_worker.lent_bus.lender")


class LentBus:
    """Held, with `async with`, while weights are copied to the GPU for a wake of the worker's own: one at a
    time, and meanwhile nobody else gets the bus. Made by `lent_bus`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._copying = asyncio.Semaphore(1)
        self._missed = False

    async def __aenter__(self) -> None:
        await self._copying.acquire()
        self._order(KEEP)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._order(SPARE)
        self._copying.release()

    def _order(self, order: bytes) -> None:
        assert self._process.stdin is not None
        if self._process.returncode is None and not self._process.stdin.is_closing():
            self._process.stdin.write(order)
        elif not self._missed:
            self._missed = True
            log.warning("the bus of this GPU is not lent any more: its lender has ended, its log says why")


@asynccontextmanager
async def lent_bus(
    path: Path, environment: Mapping[str, str], command: Sequence[str] = LENDER
) -> AsyncIterator[LentBus]:
    """A lender that listens at `path`, with `environment` on top of ours; gone at the end.

    Where it does not start, the worker does without.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        str(path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                ready = await process.stdout.readline()
        except TimeoutError:
            ready = b""
        if not ready:
            log.warning("the bus of this GPU is not lent: its lender did not start, its log says why")
        yield LentBus(process)
    finally:
        await end_child(process, EXIT_DEADLINE_S)
