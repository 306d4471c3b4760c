"""Two models on one worker: the one in demand takes KV memory of the idle one, and gives it back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.end_to_end.observing import DEADLINE_S, Watcher, generate, watching
from tests.end_to_end.test_shared_memory import sample_arenas

from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common.bus import connect_bus
from prism.common.messages.models import InitialPlacement, ModelSpec, ModelState

pytestmark = pytest.mark.engine

FIRST, SECOND = "tiny-llama", "tiny-qwen3"
WORKER_MEMORY_GB = 0.125
LIMIT_BYTES = int(WORKER_MEMORY_GB * 1e9)
REQUESTS = 14
PROMPT_TOKENS = 300
NEW_TOKENS = 150


@pytest.fixture(scope="module")
async def sharing(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningSystem]:
    """A system of its own whose worker has no more memory than two models start with."""
    folder = tmp_path_factory.mktemp("quotas")
    placement = folder / "placement.json"
    models = [
        ModelSpec(name, str(tiny_models[name]), init_placements=[InitialPlacement([0])])
        for name in (FIRST, SECOND)
    ]
    placement.write_bytes(msgspec.json.encode(models))
    settings = SystemSettings(
        placement=placement,
        worker_memory_gb=WORKER_MEMORY_GB,
        store_memory_gb=0.5,
        image_dir=folder / "images",
    )
    with (folder / "services.log").open("w", buffering=1) as log:
        async with running_system(settings, lambda name, line: print(name, line, file=log)) as running:
            yield running


def quotas(watcher: Watcher, model: str, since: int = 0) -> list[int]:
    """Its KV quota in every report that tells of it while it serves, from report number `since` on."""
    return [
        load.kv_quota_bytes
        for report in watcher.reports[since:]
        for load in report.models
        if load.model == model and load.state is ModelState.ACTIVE
    ]


async def burst(client: httpx.AsyncClient, model: str) -> list[int]:
    """More requests at once than its first quota holds; lengths of their outputs."""
    prompts = [[5 + index, 6, 7, 8, 9, 10] * (PROMPT_TOKENS // 6) for index in range(REQUESTS)]
    outputs = await asyncio.gather(*(generate(client, model, prompt, NEW_TOKENS) for prompt in prompts))
    return [len(output) for output in outputs]


async def test_memory_follows_demand_to_one_model_and_back(sharing: RunningSystem) -> None:
    samples: list[int] = []
    async with (
        connect_bus(sharing.nats_url, name="test") as bus,
        watching(bus) as watcher,
        httpx.AsyncClient(base_url=sharing.gateway_url, timeout=DEADLINE_S) as client,
    ):
        for model in (FIRST, SECOND):
            await generate(client, model, [1, 2, 3], 4)
            await watcher.until_state(model, ModelState.ACTIVE)
        seen = len(watcher.reports)
        await watcher.until(lambda: len(watcher.reports) > seen)
        begun = {model: quotas(watcher, model)[-1] for model in (FIRST, SECOND)}
        sampler = asyncio.create_task(sample_arenas(sharing, samples))
        try:
            assert min(await burst(client, FIRST)) >= 1
            assert max(quotas(watcher, FIRST)) > begun[FIRST]
            given = min(quotas(watcher, SECOND))
            assert given < begun[SECOND]
            taken = max(quotas(watcher, FIRST))
            before = len(watcher.reports)
            assert min(await burst(client, SECOND)) >= 1
            assert max(quotas(watcher, SECOND, before)) > given
            assert min(quotas(watcher, FIRST, before)) < taken
        finally:
            sampler.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sampler
        assert [watcher.state(model) for model in (FIRST, SECOND)] == [ModelState.ACTIVE] * 2
    assert len(samples) >= 10
    assert 0 < max(samples) <= LIMIT_BYTES
    assert all(report.memory_reserved_bytes <= LIMIT_BYTES for report in watcher.reports)
