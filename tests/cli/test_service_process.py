"""How the processes of a system are kept running, and ended."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from prism.cli import service_process
from prism.cli.service_process import ServiceProcess

DEADLINE_S = 10


def service(*command: str) -> ServiceProcess:
    return ServiceProcess("some", "some", command, {}, print)


class HeldSpawn:
    """Starts processes as asyncio does; of the second one, nobody hears before `let_go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[asyncio.subprocess.Process] = []
        self.second = asyncio.Event()
        self.let_go = asyncio.Event()
        self._start = asyncio.create_subprocess_exec
        monkeypatch.setattr(asyncio, "create_subprocess_exec", self._spawn)
        monkeypatch.setattr(service_process, "RESTART_DELAY_S", 0)

    async def _spawn(self, *command: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await self._start(*command, **options)
        self.started.append(process)
        if len(self.started) == 2:
            self.second.set()
            await self.let_go.wait()
        return process


@pytest.mark.parametrize("kill", [False, True])
async def test_a_service_that_is_being_started_again_ends_with_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kill: bool
) -> None:
    spawn = HeldSpawn(monkeypatch)
    once = tmp_path / "once"
    kept = service("/bin/sh", "-c", f"test -e {once} && exec sleep 1000; touch {once}")
    async with asyncio.timeout(DEADLINE_S):
        await kept.start()
        await spawn.second.wait()
        if kill:
            kept.kill()
        stopping = asyncio.create_task(kept.stop())
        await asyncio.sleep(0)
        spawn.let_go.set()
        await stopping
        assert [process.returncode for process in spawn.started] == [0, -9 if kill else -15]


async def test_a_service_that_cannot_be_started_again_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(service_process, "RESTART_DELAY_S", 0)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nrm {program}\n")
    program.chmod(0o700)
    kept = service(str(program))
    async with asyncio.timeout(DEADLINE_S):
        await kept.start()
        assert "could not be started again" in await kept.failed
        await kept.stop()


async def test_a_service_that_nobody_can_keep_running_says_so() -> None:
    def broken(name: str, line: str) -> None:
        raise ArithmeticError("a cog is missing")

    kept = ServiceProcess("some", "some", ("/bin/echo", "hello"), {}, broken)
    async with asyncio.timeout(DEADLINE_S):
        await kept.start()
        assert "a cog is missing" in await kept.failed
        await kept.stop()
