"""A burst of short prompts for a model alone on its GPU goes in few passes, whatever came before."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.messages.codec import decode
from prism.common.messages.load import LoadReport, ModelLoad

DEADLINE_S = 60.0
MODEL = "tiny-llama"
SINGLE, BURST = 12, 64
PROMPT_TOKENS = 128
MOST_PASSES = 16


@pytest.fixture(scope="module")
async def system(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> AsyncIterator[RunningSystem]:
    """A simulated model a pass of which takes 50 ms, and a token in it 10 us."""
    placement = tmp_path_factory.mktemp("passes") / "placement.json"
    home = {"gpu_ids": [0], "on": True, "max_memory_pool_size": 0.05}
    model = {"model_name": MODEL, "model_path": str(tiny_models[MODEL]), "init_placements": [home]}
    placement.write_text(json.dumps([model]))
    settings = SystemSettings(
        placement=placement,
        worker_memory_gb=0.12,
        device="simulated",
        environment={
            "PRISM_SIMULATED_PREFILL_FIXED_MS": "250",
            "PRISM_SIMULATED_PREFILL_TOKENS_PER_S": "100000",
            "PRISM_CHUNKED_PREFILL_TOKENS": "8192",
            "PRISM_MAX_RUNNING_REQUESTS": str(BURST),
        },
        drain_s=5.0,
    )
    async with running_system(settings, lambda service, line: print(service, line)) as running:
        yield running


async def complete(http: httpx.AsyncClient) -> None:
    """One token after a prompt: the engine does nothing but prefill."""
    body = {"model": MODEL, "prompt": [7] * PROMPT_TOKENS, "max_tokens": 1}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


async def steps_after(bus: Bus, requests: int) -> int:
    """Steps of the engine once so many requests are done."""
    async with asyncio.timeout(DEADLINE_S):
        loads = await bus.client.subscribe(subjects.load("*"))
        while True:
            report = decode((await loads.next_msg(DEADLINE_S)).data, LoadReport)
            of_model: list[ModelLoad] = [each for each in report.models if each.model == MODEL]
            if of_model and of_model[0].requests == requests:
                return of_model[0].engine_steps


async def test_a_burst_is_prefilled_together_after_many_single_prompts(system: RunningSystem) -> None:
    limits = httpx.Limits(max_connections=None)
    async with (
        connect_bus(system.nats_url, name="test") as bus,
        httpx.AsyncClient(
            base_url=system.gateway_url, timeout=DEADLINE_S, verify=False, limits=limits
        ) as http,
    ):
        for _ in range(SINGLE):
            await complete(http)
        before = await steps_after(bus, SINGLE)
        assert before >= SINGLE
        await asyncio.gather(*(complete(http) for _ in range(BURST)))
        passes = await steps_after(bus, SINGLE + BURST) - before
    assert passes <= MOST_PASSES
