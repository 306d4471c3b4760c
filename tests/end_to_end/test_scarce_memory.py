"""More models than there is memory for, under the default placement policy, on the simulated device with a
context's fixed cost: what the scheduler counts as free, the worker can give, down to frozen engines."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import httpx
import msgspec
import pytest
from tests.end_to_end.observing import DEADLINE_S, Watcher, watching

from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common.bus import connect_bus
from prism.common.messages.models import InitialPlacement, ModelSpec, ModelState
from prism.common.simulated_text import numbered_text

LIMIT_GB = 0.13
"""Two models with their floors of KV cache; but not one of them beside the contexts of all."""
CONTEXT_BYTES = 20_000_000
KV_TOKEN_BYTES = 2048
MODELS = [f"model-{index}" for index in range(5)]
SHORT = "short"
SHORT_POOL_GB = 0.001
ROUNDS = 30


@pytest.fixture(scope="module")
async def system(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> AsyncIterator[RunningSystem]:
    """A system with five alike models, and one that may have very little KV memory."""
    folder = tmp_path_factory.mktemp("scarce")
    path = str(tiny_models["tiny-llama"])
    specs = [ModelSpec(name, path) for name in MODELS]
    specs.append(
        ModelSpec(SHORT, path, init_placements=[InitialPlacement([0], max_memory_pool_size=SHORT_POOL_GB)])
    )
    (folder / "placement.json").write_bytes(msgspec.json.encode(specs))
    settings = SystemSettings(
        placement=folder / "placement.json",
        worker_memory_gb=LIMIT_GB,
        device="simulated",
        environment={
            "PRISM_SIMULATED_DECODE_STEP_MS": "2",
            "PRISM_SIMULATED_CONTEXT_BYTES": str(CONTEXT_BYTES),
            "PRISM_SIMULATED_KV_BYTES_PER_TOKEN": str(KV_TOKEN_BYTES),
        },
        drain_s=5.0,
    )
    async with running_system(settings, lambda service, line: print(service, line)) as running:
        yield running


@pytest.fixture
async def http(system: RunningSystem) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=system.gateway_url, timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture
async def watcher(system: RunningSystem) -> AsyncIterator[Watcher]:
    async with connect_bus(system.nats_url, name="test") as bus, watching(bus) as watch:
        await watch.until(lambda: bool(watch.reports))
        yield watch


async def complete(http: httpx.AsyncClient, model: str, prompt_tokens: int, **fields: int) -> httpx.Response:
    return await http.post("/v1/completions", json={"model": model, "prompt": [7] * prompt_tokens, **fields})


async def test_the_scheduler_plans_nothing_that_the_worker_has_no_memory_for(
    http: httpx.AsyncClient, watcher: Watcher
) -> None:
    random = Random(5)
    for _ in range(ROUNDS):
        asked = random.sample(MODELS, random.choice((1, 1, 2, 3)))
        tokens = random.choice((5, 50, 400))
        answers = await asyncio.gather(*(complete(http, model, 7, max_tokens=tokens) for model in asked))
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == numbered_text(7, tokens)
    assert [event for event in watcher.events if event.kind == "failed"] == []
    limit = watcher.reports[-1].memory_limit_bytes
    assert all(report.memory_reserved_bytes <= limit for report in watcher.reports)
    assert all(report.elastic and report.freezes for report in watcher.reports)
    frozen = {
        load.model for report in watcher.reports for load in report.models if load.state is ModelState.FROZEN
    }
    assert frozen, "contexts of all models do not fit beside one that is active"
    # Who was frozen has served since: all have been asked for time and again.
    assert frozen <= {event.model for event in watcher.events if event.kind == "active"}


async def test_a_request_beyond_all_memory_is_refused_at_once_and_told_the_limit(
    http: httpx.AsyncClient,
) -> None:
    pool_tokens = int(SHORT_POOL_GB * 1e9) // KV_TOKEN_BYTES
    answer = await asyncio.wait_for(complete(http, SHORT, 600, max_tokens=10), 30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "600 prompt tokens" in error["message"]
    assert "1.0 MB" in error["message"]
    assert "max_memory_pool_size" in error["message"]
    ends = await complete(http, SHORT, 200, max_tokens=2000)
    assert ends.status_code == 200
    choice, usage = ends.json()["choices"][0], ends.json()["usage"]
    assert choice["finish_reason"] == "length"
    assert 0.9 * pool_tokens < usage["total_tokens"] <= pool_tokens
