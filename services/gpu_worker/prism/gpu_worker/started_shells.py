"""Shells that are started processes, for engines whose process cannot be forked from another one."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.kvcached_segments import remove_segments
from prism.gpu_worker.shells import Shell, exit_words

log = logging.getLogger(__name__)

ALIVE = "PRISM_SHELL_ALIVE"
"""Names the descriptor that a shell and the processes of its ranks keep open for as long as they live."""

RANKS_END_S = 30.0
"""What outlives its shell for so long is not waited for any longer, nor is its memory taken for used."""


class StartedShells:
    """Starts `python -m <module> FD <inherited FDs> <arguments>` for each shell. Made by `started_shells`."""

    ready = True

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._module = module
        self._environment = dict(environment)
        self._arguments = list(arguments)
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._watches: set[asyncio.Task[None]] = set()

    async def take(self, inherited: Sequence[int] = ()) -> Shell:
        """A shell, which gets the file descriptors `inherited`.

        Raises PrismError(internal) when no process can be started.
        """
        try:
            alive, theirs_alive = os.pipe()
        except OSError as error:
            raise PrismError(ErrorCode.INTERNAL, f"no shell: {error}", retry=True) from error
        try:
            return await self._started(inherited, alive, theirs_alive)
        except BaseException:
            os.close(alive)
            raise
        finally:
            os.close(theirs_alive)

    async def _started(self, inherited: Sequence[int], alive: int, theirs_alive: int) -> Shell:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    self._module,
                    str(theirs.fileno()),
                    *map(str, inherited),
                    *self._arguments,
                    pass_fds=[theirs.fileno(), theirs_alive, *inherited],
                    stdin=asyncio.subprocess.DEVNULL,
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        ALIVE: str(theirs_alive),
                        **self._environment,
                    },
                )
            except BaseException as error:
                ours.close()
                if isinstance(error, OSError):
                    raise PrismError(ErrorCode.INTERNAL, f"no shell: {error}", retry=True) from error
                raise
        shell = Shell(process.pid, ours)
        self._processes[process.pid] = process
        watch = asyncio.create_task(self._watch(process, shell, alive), name=f"watch shell {process.pid}")
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return shell

    async def _watch(self, process: asyncio.subprocess.Process, shell: Shell, alive: int) -> None:
        code = await process.wait()
        del self._processes[process.pid]
        how = exit_words(code)
        if not shell.exited.done():
            shell.exited.set_result(how)
        # Ranks end once the shell has ended, and what they hold on their GPUs is free only then.
        if not await _closed(alive, RANKS_END_S):
            log.warning("a rank of shell %d is there still, %g s after it", process.pid, RANKS_END_S)
        remove_segments(process.pid)
        shell.ended(how)

    async def stop(self) -> None:
        """End every process that is left."""
        for process in self._processes.values():
            log.warning("shell %d is still there, killed", process.pid)
            process.kill()
        while self._watches:
            await asyncio.wait(set(self._watches))


async def _closed(pipe: int, deadline_s: float) -> bool:
    """Wait until nobody has the other end of `pipe` any more, and close this one; False when that takes
    longer than `deadline_s` seconds."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pipe, ended.set)
    try:
        async with asyncio.timeout(deadline_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pipe)
        os.close(pipe)
    return True


@asynccontextmanager
async def started_shells(
    module: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> AsyncIterator[StartedShells]:
    """Shells of `module`, with `environment` on top of ours; none is left at the end."""
    shells = StartedShells(module, arguments, environment or {})
    try:
        yield shells
    finally:
        await shells.stop()
