"""`--mode static` and `--mode elastic`: models stay at home, awake; KV cache stays too, or moves."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from tests.end_to_end.observing import DEADLINE_S, Watcher, generate, watching

from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common.bus import connect_bus
from prism.common.messages.models import ModelState

HOT, COLD, OUT = "tiny-llama", "tiny-qwen3", "tiny-llama-big"
REQUESTS = 12
PROMPT_TOKENS = 400
NEW_TOKENS = 300


@asynccontextmanager
async def system_in(
    mode: str, tiny_models: dict[str, Path], folder: Path
) -> AsyncIterator[tuple[RunningSystem, Watcher, httpx.AsyncClient]]:
    """Simulated engines on one worker: two models at home there, and one that is off."""
    models = [
        {
            "model_name": name,
            "model_path": str(tiny_models[name]),
            "init_placements": [{"gpu_ids": [0], "on": name != OUT, "max_memory_pool_size": 0.03}],
        }
        for name in (HOT, COLD, OUT)
    ]
    (folder / "placement.json").write_text(json.dumps(models))
    settings = SystemSettings(
        placement=folder / "placement.json",
        worker_memory_gb=0.15,
        device="simulated",
        environment={"PRISM_SIMULATED_DECODE_STEP_MS": "2"},
        drain_s=5.0,
        mode=mode,
    )
    async with (
        running_system(settings, lambda service, line: print(service, line)) as running,
        connect_bus(running.nats_url, name="test") as bus,
        watching(bus) as watcher,
        httpx.AsyncClient(base_url=running.gateway_url, timeout=DEADLINE_S) as client,
    ):
        yield running, watcher, client


def quotas(watcher: Watcher, model: str) -> set[int]:
    """Its KV quotas in all reports of it while it serves."""
    loads = [load for report in watcher.reports for load in report.models]
    return {load.kv_quota_bytes for load in loads if load.model == model and load.state is ModelState.ACTIVE}


@pytest.mark.parametrize(("mode", "moves"), [("static", False), ("elastic", True)])
async def test_models_stay_at_home_and_kv_cache_only_in_static(
    mode: str, moves: bool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    async with system_in(mode, tiny_models, tmp_path) as (_, watcher, client):
        for model in (HOT, COLD):
            await watcher.until_state(model, ModelState.ACTIVE)
        await watcher.until(lambda: bool(quotas(watcher, HOT)))
        prompts = [[5 + index] * PROMPT_TOKENS for index in range(REQUESTS)]
        answers = await asyncio.gather(*(generate(client, HOT, prompt, NEW_TOKENS) for prompt in prompts))
        assert [len(answer) for answer in answers] == [NEW_TOKENS] * REQUESTS
        await generate(client, COLD, [1, 2, 3], 4)
        assert (len(quotas(watcher, HOT)) > 1) is moves
        assert len(quotas(watcher, COLD)) == 1 or moves
        assert watcher.state(OUT) in (ModelState.COLD, ModelState.STAGED)
        assert not [event for event in watcher.events if event.kind in ("dozed", "moved")]
        assert all(report.elastic is moves for report in watcher.reports)
