"""The simulated device in the whole system: it says what it is, and a lost or doubled token would show."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import psutil
import pytest

from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common import subjects
from prism.common.bus import connect_bus
from prism.common.messages.codec import decode
from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelState
from prism.common.simulated_text import numbered_text

DEADLINE_S = 60.0
MODEL = "tiny-llama"
OTHER = "tiny-qwen3"


@pytest.fixture(scope="module")
async def system(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> AsyncIterator[RunningSystem]:
    """A system with two simulated models and room for one, a token each 5 ms."""
    folder = tmp_path_factory.mktemp("simulated")
    models = [
        {
            "model_name": name,
            "model_path": str(tiny_models[name]),
            "init_placements": [{"gpu_ids": [0], "on": name == MODEL, "max_memory_pool_size": 0.02}],
        }
        for name in (MODEL, OTHER)
    ]
    (folder / "placement.json").write_text(json.dumps(models))
    settings = SystemSettings(
        placement=folder / "placement.json",
        worker_memory_gb=0.08,
        device="simulated",
        environment={"PRISM_SIMULATED_DECODE_STEP_MS": "5"},
        drain_s=5.0,
    )
    async with running_system(settings, lambda service, line: print(service, line)) as running:
        yield running


async def complete(http: httpx.AsyncClient, tokens: int, model: str = MODEL) -> str:
    """The text of a stream of `tokens` tokens after a prompt of seven."""
    body = {"model": model, "prompt": [7] * 7, "max_tokens": tokens, "stream": True}
    text = ""
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


@pytest.fixture
async def http(system: RunningSystem) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=system.gateway_url, timeout=DEADLINE_S, verify=False) as client:
        yield client


async def test_it_says_what_it_is_wherever_it_shows(system: RunningSystem, http: httpx.AsyncClient) -> None:
    assert await complete(http, 40) == numbered_text(7, 40)
    model = (await http.get(f"/v1/models/{MODEL}")).json()
    assert (model["state"], model["devices"]) == ("ready", ["simulated"])
    report = await _report(system, lambda load: load.model == MODEL)
    async with connect_bus(system.nats_url, name="test") as bus:
        answer = await bus.client.request("$SRV.INFO.prism-gpu-worker", timeout=DEADLINE_S)
    assert report.device == "simulated"
    assert json.loads(answer.data)["metadata"]["device"] == "simulated"


async def test_a_killed_engine_loses_and_doubles_no_token(
    system: RunningSystem, http: httpx.AsyncClient
) -> None:
    worker = system.services["gpu_worker"].process
    assert worker is not None
    streams = [asyncio.create_task(complete(http, 1200)) for _ in range(4)]
    await _report(system, lambda load: load.running == 4)
    (engine,) = psutil.Process(worker.pid).children()
    engine.send_signal(signal.SIGKILL)
    assert await asyncio.gather(*streams) == [numbered_text(7, 1200)] * 4


async def test_models_take_turns_and_a_sleeping_one_holds_no_memory(
    system: RunningSystem, http: httpx.AsyncClient
) -> None:
    for model in (MODEL, OTHER, MODEL):
        assert await complete(http, 10, model) == numbered_text(7, 10)
    report = await _report(system, lambda load: load.model == OTHER and load.state is ModelState.DOZING)
    held = {load.model: load.weights_bytes for load in report.models}
    assert held[OTHER] == 0
    assert held[MODEL] >= 20_000_000


async def _report(system: RunningSystem, holds: Callable[[ModelLoad], bool]) -> LoadReport:
    """The next load report in which some model's entry is as wanted."""
    async with asyncio.timeout(DEADLINE_S), connect_bus(system.nats_url, name="test") as bus:
        loads = await bus.client.subscribe(subjects.load("*"))
        while True:
            report = decode((await loads.next_msg(DEADLINE_S)).data, LoadReport)
            if any(holds(load) for load in report.models):
                return report
