"""Shells that are started ahead of need: imported, with a CUDA context, when a model asks for one."""

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from prism.common.errors import ErrorCode, PrismError, words_of
from prism.common.tasks import end_task
from prism.gpu_worker.shells import Shell
from prism.gpu_worker.started_shells import StartedShells, started_shells

log = logging.getLogger(__name__)

WARM_DEADLINE_S = 300.0
RETRY_S = 5.0
EXIT_DEADLINE_S = 5.0


class WarmShells:
    """Keeps `count` shells warm. Made by `warm_shells`. `changed` tells when one gets warm or is taken."""

    def __init__(self, shells: StartedShells, count: int) -> None:
        self._shells = shells
        self._count = count
        self._warm: deque[Shell] = deque()
        self.changed = asyncio.Condition()

    @property
    def ready(self) -> bool:
        """Whether a shell is warm."""
        return any(not shell.exited.done() for shell in self._warm)

    async def take(self) -> Shell:
        """A warm shell; another one is begun in its place. Raises PrismError(internal, retry) when none gets
        warm within WARM_DEADLINE_S."""
        try:
            async with asyncio.timeout(WARM_DEADLINE_S), self.changed:
                while True:
                    while self._warm:
                        shell = self._warm.popleft()
                        self.changed.notify_all()
                        if not shell.exited.done():
                            return shell
                    await self.changed.wait()
        except TimeoutError as error:
            raise PrismError(
                ErrorCode.INTERNAL,
                f"no engine process got ready within {WARM_DEADLINE_S:g} s; its log says why",
                retry=True,
            ) from error

    async def keep(self) -> None:
        """Start shells one after the other, until cancelled."""
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: len(self._warm) < self._count)
            try:
                shell = await self._warmed()
            except (PrismError, OSError) as error:
                log.error("%s; trying again in %g s", words_of(error), RETRY_S)
                await asyncio.sleep(RETRY_S)
                continue
            async with self.changed:
                self._warm.append(shell)
                self.changed.notify_all()

    async def _warmed(self) -> Shell:
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        try:
            shell = await self._shells.take(inherited=[write])
        finally:
            os.close(write)

        def on_readable() -> None:
            if not told.done():
                told.set_result(None)

        loop.add_reader(read, on_readable)
        waited: list[asyncio.Future[Any]] = [told, shell.exited]
        try:
            await asyncio.wait(waited, timeout=WARM_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            if told.done() and os.read(read, 1):
                return shell
            # A pipe that ends without a word is that of a process that does, a moment later.
            await asyncio.wait({shell.exited}, timeout=EXIT_DEADLINE_S if told.done() else 0)
            how = shell.exited.result() if shell.exited.done() else f"not warm after {WARM_DEADLINE_S:g} s"
            raise PrismError(ErrorCode.INTERNAL, f"an engine process did not get ready: {how}", retry=True)
        except BaseException:
            shell.connection.close()
            raise
        finally:
            loop.remove_reader(read)
            os.close(read)

    async def close(self) -> None:
        """Let go of the shells that nobody took: the end of its socket ends each."""
        for shell in self._warm:
            shell.connection.close()
        ending = {shell.exited for shell in self._warm}
        self._warm.clear()
        if ending:
            await asyncio.wait(ending, timeout=EXIT_DEADLINE_S)


@asynccontextmanager
async def warm_shells(module: str, count: int, environment: Mapping[str, str]) -> AsyncIterator[WarmShells]:
    """`count` shells of `module` kept warm (at least one); none is left at the end.

    A shell is told the number of a file descriptor as its second argument, and writes a byte there once it is
    warm.
    """
    async with started_shells(module, environment=environment) as started:
        shells = WarmShells(started, max(1, count))
        keeper = asyncio.create_task(shells.keep(), name="keep shells warm")
        try:
            yield shells
        finally:
            await end_task(keeper)
            await shells.close()
