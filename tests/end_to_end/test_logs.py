"""Each failure is told once, by the service that owns it: the whole system with real engines, JSON logs."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.end_to_end.observing import engine_processes
from tests.end_to_end.test_failed_models import break_folder

from prism.cli.demo import tiny_placement
from prism.cli.system import RunningSystem, SystemSettings, running_system

pytestmark = pytest.mark.engine

DEADLINE_S = 90.0
MODEL = "tiny-llama"
BROKEN = "no-last-layer"
LOUD = ("WARNING", "ERROR", "CRITICAL")
Line = dict[str, str]


class Logs:
    """All lines of all services: those in JSON, and what the launcher says itself."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.of_launcher: list[str] = []
        self._changed = asyncio.Event()

    def take(self, service: str, line: str) -> None:
        if line.startswith("{"):
            self.lines.append(json.loads(line))
        else:
            self.of_launcher.append(f"{service}: {line}")
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at after every line."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await self._changed.wait()

    def since(self, begin: int, service: str, text: str = "") -> list[Line]:
        """What `service` has said with `text` in it, from line `begin` on."""
        return [line for line in self.lines[begin:] if line["service"] == service and text in line["message"]]

    def loud(self, begin: int) -> list[Line]:
        """Warnings and errors from line `begin` on."""
        return [line for line in self.lines[begin:] if line["level"] in LOUD]


class Watched:
    """A running system, its log, and an HTTP client of its gateway."""

    def __init__(self, system: RunningSystem, logs: Logs, http: httpx.AsyncClient) -> None:
        self.system = system
        self.logs = logs
        self.http = http

    async def worker(self) -> str:
        """The name of the worker that last made the model active."""
        active = [line for line in self.logs.lines if line["message"] == "active" and line["model"] == MODEL]
        return active[-1]["worker"]

    async def stream_across(self, fault: Callable[[], None]) -> str:
        """Have a long answer streamed, do `fault` after its first token; the id that the client saw."""
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "stream": True}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            lines = answer.aiter_lines()
            first = await anext(lines)
            fault()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        request: str = json.loads(first.removeprefix("data: "))["id"]
        return request


@pytest.fixture(scope="module")
async def watched(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> AsyncIterator[Watched]:
    folder = tmp_path_factory.mktemp("logs")
    broken = Path(shutil.copytree(tiny_models[MODEL], folder / BROKEN))
    break_folder(BROKEN, broken)
    placement = folder / "placement.json"
    placement.write_bytes(msgspec.json.encode(tiny_placement([tiny_models[MODEL], broken])))
    settings = SystemSettings(
        placement=placement,
        worker_memory_gb=0.1,
        store_memory_gb=0.5,
        image_dir=folder / "images",
        log_format="json",
        drain_s=5.0,
    )
    logs = Logs()
    async with (
        running_system(settings, logs.take) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=DEADLINE_S) as http,
    ):
        await logs.until(lambda: any(line["message"] == "active" for line in logs.lines))
        yield Watched(system, logs, http)


def replays(watched: Watched, begin: int) -> list[Line]:
    return watched.logs.since(begin, "gateway", "routing again")


async def test_a_system_that_is_in_order_is_quiet(watched: Watched) -> None:
    assert watched.logs.loud(0) == []
    assert watched.logs.of_launcher == [f"gateway: gateway ready at {watched.system.gateway_url}"]


async def test_a_killed_engine_is_told_by_its_worker_and_each_replay_by_the_gateway(watched: Watched) -> None:
    worker, begin = await watched.worker(), len(watched.logs.lines)
    request = await watched.stream_across(lambda: engine_processes(watched.system)[MODEL].kill())
    (loud,) = watched.logs.loud(begin)
    assert (loud["service"], loud["model"], loud["worker"]) == ("gpu_worker", MODEL, worker)
    assert loud["message"].startswith("engine ended: ")
    assert "the next one starts it again" in loud["message"]
    replay, *again = replays(watched, begin)
    assert (replay["request"], replay["model"], replay["worker"]) == (request, MODEL, worker)
    assert len(replay["rid"]) == 32
    # Tried there once more, if the gateway had not seen yet that the route is closed.
    assert all("no longer listens" in line["message"] for line in again)


async def test_a_model_that_does_not_start_is_told_once_with_what_to_do(watched: Watched) -> None:
    worker, begin = await watched.worker(), len(watched.logs.lines)
    refused = await watched.http.post("/v1/completions", json={"model": BROKEN, "prompt": "Hello"})
    assert refused.status_code == 503
    await watched.logs.until(lambda: bool(watched.logs.loud(begin)))
    (loud,) = watched.logs.loud(begin)
    assert (loud["service"], loud["model"], loud["worker"]) == ("gpu_worker", BROKEN, worker)
    assert "the checkpoint holds nothing for" in loud["message"]
    assert "`prism models retry`" in loud["message"]


async def test_a_killed_worker_is_told_once_by_each_who_bears_a_consequence(watched: Watched) -> None:
    logs, worker = watched.logs, await watched.worker()
    begin, launcher = len(logs.lines), len(logs.of_launcher)

    def kill() -> None:
        process = watched.system.services["gpu_worker"].process
        assert process is not None
        process.kill()

    request = await watched.stream_across(kill)
    assert logs.of_launcher[launcher:] == ["gpu_worker: ended with status -9, started again"]
    (loud,) = logs.loud(begin)
    assert (loud["service"], loud["worker"]) == ("global_scheduler", worker)
    assert "see its own log" in loud["message"]
    (replay,) = replays(watched, begin)
    assert (replay["request"], replay["model"], replay["worker"]) == (request, MODEL, worker)
    (silent,) = logs.since(begin, "gateway", "a worker has gone silent")
    assert silent["worker"] == worker
