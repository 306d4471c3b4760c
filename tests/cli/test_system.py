"""When a system counts as up: its gateways answer, and answer for every model of the placement file."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prism.cli import system
from prism.cli.service_process import ServiceProcess
from prism.cli.system import NATS, RunningSystem, SystemSettings, running_system, wait_until_served
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


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('waiting', flush=True); "
)
"""A service that waits for the bus, and hears of no signal meanwhile."""


async def test_a_system_that_never_came_up_ends_at_once_and_nothing_of_it_is_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(system, "ABANDON_DEADLINE_S", 0.1)
    placement = tmp_path / "placement.json"
    placement.write_text("[]")
    waiting: asyncio.Queue[str] = asyncio.Queue()
    lines: list[str] = []
    found: list[RunningSystem] = []

    def on_line(name: str, line: str) -> None:
        lines.append(line)
        if line == "waiting":
            waiting.put_nowait(name)

    def stubborn(self: RunningSystem, kind: str) -> ServiceProcess:
        found[:] = [self]
        command = [sys.executable, "-c", f"{STUBBORN} time.sleep(1000)"]
        service = ServiceProcess(kind, kind, command, {}, on_line)
        self._ready[kind] = asyncio.Event()
        self._know(service)
        return service

    monkeypatch.setattr(RunningSystem, "_start_next", stubborn)

    async def start() -> None:
        async with running_system(SystemSettings(placement), on_line):
            raise AssertionError("no gateway is ready")

    async with asyncio.timeout(DEADLINE_S):
        starting = asyncio.create_task(start())
        names = {await waiting.get() for _ in range(4)}
        starting.cancel()
        await asyncio.wait([starting])
    assert starting.cancelled()
    assert names == {"gateway", "global_scheduler", "gpu_worker", "model_store"}
    ended = {
        name: service.process and service.process.returncode for name, service in found[0].services.items()
    }
    assert ended.pop(NATS) != -9, "it hears"
    assert set(ended.values()) == {-9}
    assert not [line for line in lines if "started again" in line]
