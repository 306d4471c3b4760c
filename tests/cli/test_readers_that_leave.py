"""Whoever reads what a command prints may go (`| head`): that ends what only prints, and nothing else."""

import asyncio
import os
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from prism.cli import retry, up
from prism.cli.models import models_command
from prism.cli.nats_server import NatsServer
from prism.cli.system import SystemSettings
from prism.common.bus import connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.events import Event

DEADLINE_S = 20.0


def gone(*_: object, **__: object) -> None:
    raise BrokenPipeError(32, "Broken pipe")


def test_a_system_goes_on_when_nobody_reads_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click, "echo", gone)
    up.print_service_line("gateway", "hello")
    up.tell("stopping", err=True)


async def test_events_end_with_their_reader(session_nats: NatsServer) -> None:
    read, write = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.cli.main", "events", "--nats", session_nats.url),
        stdout=write,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(write)
    os.close(read)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            assert b"listening" in await process.stderr.readline()
            async with connect_bus(session_nats.url, name="test") as bus:
                await bus.tell(Event("dozed", "m", "worker-1"))
                await bus.flush()
                said = await process.stderr.read()
            assert await process.wait() == 0
        assert b"Traceback" not in said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Interrupted:
    """Stands in for a system that failed, and is interrupted while what was started is ended."""

    async def __aenter__(self) -> None:
        try:
            raise PrismError(ErrorCode.INTERNAL, "gateway ended at once with status 1")
        finally:
            os.kill(os.getpid(), 2)
            await asyncio.sleep(DEADLINE_S)

    async def __aexit__(self, *_: object) -> None:
        """Nothing came up."""


async def test_why_a_system_failed_is_told_though_its_end_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def fine(_: object) -> None:
        """Nothing is in the way."""

    monkeypatch.setattr(up, "check_before_start", fine)
    monkeypatch.setattr(up, "running_system", lambda *_: Interrupted())
    file = tmp_path / "placement.json"
    file.write_text("[]")
    with pytest.raises(PrismError, match="ended at once"):
        await up.run_until_stopped(SystemSettings(placement=file))


def test_a_retry_goes_to_the_bus_that_was_named_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    async def refuse(nats_url: str, model: str, deadline_s: float) -> int:
        asked.append(nats_url)
        return 0

    monkeypatch.setattr(retry, "_retry", refuse)
    environment = {"PRISM_NATS_URL": "nats://environment:2"}
    for arguments in (
        ["--nats", "nats://flag:1", "retry", "m"],
        ["retry", "m", "--nats", "nats://flag:1"],
        ["retry", "m"],
    ):
        CliRunner().invoke(models_command, arguments, env=environment)
    assert asked == ["nats://flag:1", "nats://flag:1", "nats://environment:2"]
