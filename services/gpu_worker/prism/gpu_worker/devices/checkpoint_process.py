"""The worker's side of the checkpoint server: a `Freezer` whose calls have deadlines."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.child_process import end_child
from prism.gpu_worker.devices.checkpoint_server import Answer, Hello, Order

log = logging.getLogger(__name__)

START_DEADLINE_S = 30.0
EXIT_DEADLINE_S = 5.0
SERVER = (sys.executable, "-m", "prism.gpu_worker.devices.checkpoint_server")


class CheckpointProcess:
    """Freezes and thaws by a process that holds the driver. Made by `checkpoint_process`.

    One order at a time; a server that dies or hangs is replaced by the next order.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = tuple(command)
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._unsupported = ""
        self._ordering = asyncio.Lock()

    def check(self) -> None:
        """Raises PrismError(unsupported) once the server has said that nothing can be frozen."""
        if self._unsupported:
            raise PrismError(ErrorCode.UNSUPPORTED, f"nothing can be frozen here: {self._unsupported}")

    async def start(self) -> None:
        """Start the server and hear whether it can freeze. Raises PrismError when it does not come up."""
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment},
        )
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                line = await self._line(process)
        except BaseException:
            await self._end()
            raise
        self._unsupported = msgspec.json.decode(line, type=Hello).unsupported

    async def freeze(self, pid: int, deadline_s: float) -> dict[str, float]:
        """See `Freezer`."""
        # Half of the time for those calls of the process that are under way; the rest for the checkpoint.
        return await self._order(Order(pid, lock_timeout_ms=int(deadline_s * 500)), deadline_s)

    async def thaw(self, pid: int, deadline_s: float) -> dict[str, float]:
        """See `Freezer`."""
        return await self._order(Order(pid, thaw=True), deadline_s)

    async def _order(self, order: Order, deadline_s: float) -> dict[str, float]:
        what = "thawing" if order.thaw else "freezing"
        async with self._ordering:
            if self._process is None or self._process.returncode is not None:
                try:
                    await self.start()
                except (OSError, TimeoutError) as error:
                    raise self._lost(f"{what} process {order.pid}: no checkpoint server: {error}") from error
            self.check()
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(msgspec.json.encode(order) + b"\n")
                async with asyncio.timeout(deadline_s):
                    answer = msgspec.json.decode(await self._line(self._process), type=Answer)
            except BaseException as error:
                # Nobody knows how far it came: neither it nor the process is to be trusted any more.
                await self._end()
                if isinstance(error, OSError):
                    why = f"no answer within {deadline_s:.1f} s" if isinstance(error, TimeoutError) else error
                    raise self._lost(f"{what} process {order.pid}: {why}") from error
                raise
        if answer.error:
            if order.thaw or not answer.runs:
                raise self._lost(answer.error)
            raise PrismError(ErrorCode.INTERNAL, answer.error, retry=True)
        return answer.seconds

    def _lost(self, message: str) -> PrismError:
        return PrismError(ErrorCode.ENGINE_LOST, message, retry=True)

    async def _line(self, process: asyncio.subprocess.Process) -> bytes:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise ConnectionError("the checkpoint server ended; its log says why")
        return line

    async def stop(self) -> None:
        """End the server: it goes when there are no more orders."""
        await self._end(EXIT_DEADLINE_S)

    async def _end(self, grace_s: float = 0.0) -> None:
        process, self._process = self._process, None
        if process is not None:
            await end_child(process, grace_s)


@asynccontextmanager
async def checkpoint_process(
    environment: Mapping[str, str], command: Sequence[str] = SERVER
) -> AsyncIterator[CheckpointProcess]:
    """A checkpoint server that runs with `environment` on top of ours; gone at the end."""
    freezer = CheckpointProcess(command, environment)
    try:
        await freezer.start()
        freezer.check()
    except (PrismError, OSError) as error:
        # A worker without a frozen tier is still a worker.
        log.warning("no frozen tier: %s", error)
    try:
        yield freezer
    finally:
        await freezer.stop()
