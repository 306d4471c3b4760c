"""Shells that are started processes."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from prism.gpu_worker import started_shells as module
from prism.gpu_worker.shells import Shell
from prism.gpu_worker.started_shells import StartedShells, started_shells

MODULE = "tests.gpu_worker.shell_with_a_rank"
DEADLINE_S = 20.0


@contextmanager
def rank_that_lives_on() -> Iterator[tuple[int, int]]:
    """The descriptor that the rank inherits, and the one that ends it when it is closed."""
    held, ends = os.pipe()
    try:
        yield held, ends
    finally:
        os.close(held)


async def shell_that_ended(shells: StartedShells, held: int) -> Shell:
    """A shell whose own process has ended, and that of its rank has not."""
    shell = await shells.take([held])
    process = shells._processes[shell.pid]
    shell.connection.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        assert await loop.sock_recv(shell.connection, 1) == b"r"
        shell.connection.close()
        await process.wait()
    return shell


async def test_nothing_is_left_of_a_shell_when_its_last_rank_has_ended() -> None:
    with rank_that_lives_on() as (held, ends):
        async with started_shells(MODULE) as shells:
            shell = await shell_that_ended(shells, held)
            assert await shell.exited == "exit status 0", "that is told at once"
            assert not shell.gone.done(), "what the rank holds is not free yet"
            os.close(ends)
            async with asyncio.timeout(DEADLINE_S):
                await shell.gone


async def test_a_rank_that_does_not_end_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RANKS_END_S", 0.05)
    with rank_that_lives_on() as (held, ends):
        async with started_shells(MODULE) as shells:
            shell = await shell_that_ended(shells, held)
            async with asyncio.timeout(DEADLINE_S):
                await shell.gone
            assert "is there still" in caplog.text
            os.close(ends)
