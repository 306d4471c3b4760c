"""When a system counts as up: its gateways answer, and answer for every model of the placement file. And how
its processes are kept."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prism.cli import system
from prism.cli.system import ServiceProcess, wait_until_served
from prism.common.tasks import end_task

DEADLINE_S = 10


@contextmanager
def registering_gateway() -> Iterator[tuple[str, list[str]]]:
    """A gateway that is ready at once and learns one more thing of two models each time that it is asked for
    them: its URL, and what it knows by now, in that order."""
    coming = ["first", "second", "first is read", "second is no good"]
    known: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            entries: list[dict[str, object]] = [{"id": model, "state": "cold"} for model in known[:2]]
            if "first is read" in known:
                entries[0]["context_length"] = 512
            if "second is no good" in known:
                entries[1]["state"] = "failed"
            body = json.dumps({"data": entries}).encode()
            if self.path == "/v1/models" and coming:
                known.append(coming.pop(0))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", known
        finally:
            server.shutdown()
            thread.join()


async def test_a_ready_gateway_that_does_not_know_the_models_yet_is_waited_for() -> None:
    failure = asyncio.create_task(asyncio.Event().wait())
    try:
        with registering_gateway() as (url, known):
            async with asyncio.timeout(DEADLINE_S):
                await wait_until_served(url, {"first", "second"}, failure)
            assert known == ["first", "second", "first is read", "second is no good"]
    finally:
        await end_task(failure)


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
        monkeypatch.setattr(system, "RESTART_DELAY_S", 0)

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
    monkeypatch.setattr(system, "RESTART_DELAY_S", 0)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nrm {program}\n")
    program.chmod(0o700)
    kept = service(str(program))
    async with asyncio.timeout(DEADLINE_S):
        await kept.start()
        assert "could not be started again" in await kept.failed
        await kept.stop()
