"""Shells that are started ahead of need."""

import asyncio
import errno
import os
from pathlib import Path

import psutil
import pytest
from tests.processes import command_line

from prism.common.errors import PrismError
from prism.gpu_worker import warm_shells as module
from prism.gpu_worker.kvcached_segments import SHARED_MEMORY, segment_name
from prism.gpu_worker.warm_shells import WarmShells, warm_shells

MODULE = "tests.gpu_worker.warm_shell_process"
DEADLINE_S = 20


async def until_ready(shells: WarmShells) -> None:
    """Wait until a shell is warm."""
    async with asyncio.timeout(DEADLINE_S), shells.changed:
        await shells.changed.wait_for(lambda: shells.ready)


async def test_a_shell_is_warm_before_it_is_asked_for_and_replaced_when_taken() -> None:
    async with warm_shells(MODULE, 1, {}) as shells:
        assert not shells.ready
        await until_ready(shells)
        first = await shells.take()
        await until_ready(shells)
        async with asyncio.timeout(DEADLINE_S):
            second = await shells.take()
        assert first.pid != second.pid
        pids = [first.pid, second.pid]
        for shell in (first, second):
            shell.connection.close()
    assert not any(psutil.pid_exists(pid) for pid in pids), "none is left at the end"


async def test_what_kvcached_left_of_a_shell_is_gone_when_the_shell_is() -> None:
    async with warm_shells(MODULE, 1, {}) as shells:
        await until_ready(shells)
        shell = await shells.take()
        of_its_ranks = [SHARED_MEMORY / segment_name(shell.pid, rank) for rank in (0, 1)]
        of_another = SHARED_MEMORY / segment_name(10 * shell.pid, 0)
        for path in (*of_its_ranks, of_another):
            path.touch()
        try:
            psutil.Process(shell.pid).kill()
            async with asyncio.timeout(DEADLINE_S):
                await shell.gone
            shell.connection.close()
            assert not any(path.exists() for path in of_its_ranks)
            assert of_another.exists()
        finally:
            for path in (*of_its_ranks, of_another):
                path.unlink(missing_ok=True)


async def test_a_warm_shell_that_dies_is_not_handed_out() -> None:
    async with warm_shells(MODULE, 1, {}) as shells:
        await until_ready(shells)
        [waiting] = [child for child in psutil.Process().children() if MODULE in command_line(child)]
        waiting.kill()
        async with asyncio.timeout(DEADLINE_S):
            # The worker notices by the process's exit; until then the shell may still be handed out.
            shell = await shells.take()
            if shell.pid == waiting.pid:
                assert await shell.exited == "killed by SIGKILL"
                shell.connection.close()
                shell = await shells.take()
        assert shell.pid != waiting.pid
        shell.connection.close()


async def test_a_shell_that_ends_before_it_is_warm_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    async with warm_shells(MODULE, 1, {"FAILS_UNTIL_EXISTS": str(tmp_path / "failed")}) as shells:
        async with asyncio.timeout(DEADLINE_S):
            shell = await shells.take()
        shell.connection.close()
    assert "did not get ready: exit status 7" in caplog.text


async def test_a_moment_without_file_descriptors_is_not_the_end_of_shells(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    pipe2 = os.pipe2
    lacking = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    def troubled(flags: int) -> tuple[int, int]:
        if lacking:
            raise lacking.pop()
        return pipe2(flags)

    monkeypatch.setattr(os, "pipe2", troubled)
    async with warm_shells(MODULE, 1, {}) as shells:
        async with asyncio.timeout(DEADLINE_S):
            shell = await shells.take()
        shell.connection.close()
    assert "Too many open files" in caplog.text


async def test_whoever_waits_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with warm_shells(MODULE, 1, {"NEVER_WARM": "yes"}) as shells:
        monkeypatch.setattr(module, "WARM_DEADLINE_S", 0.05)
        with pytest.raises(PrismError, match=r"no engine process got ready within 0\.05 s"):
            await shells.take()
