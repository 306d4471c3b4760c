"""A model's folder gets the next checkpoint while its engine serves: the whole system with a real engine.

What runs ends as it began; what comes after is answered by the new weights, in the new tokenizer's words.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.end_to_end.observing import DEADLINE_S, watching

from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common import subjects
from prism.common.bus import connect_bus
from prism.common.messages.codec import encode
from prism.common.messages.models import ModelSpec, ModelState

pytestmark = pytest.mark.engine

MODEL, REFERENCE = "chat", "reference"
BEFORE, AFTER = "tiny-llama", "tiny-qwen3"
LONG, SHORT = 400, 12


@pytest.fixture
def folder(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    """The model's folder, of this test's own."""
    return shutil.copytree(tiny_models[BEFORE], tmp_path / MODEL)


@pytest.fixture
async def system(tmp_path: Path, folder: Path, tiny_models: dict[str, Path]) -> AsyncIterator[RunningSystem]:
    """A system with that model, and one that is now what it will be."""
    placement = tmp_path / "placement.json"
    specs = [ModelSpec(MODEL, str(folder)), ModelSpec(REFERENCE, str(tiny_models[AFTER]))]
    placement.write_bytes(msgspec.json.encode(specs))
    settings = SystemSettings(
        placement=placement, worker_memory_gb=0.24, store_memory_gb=1.0, image_dir=tmp_path / "images"
    )
    with (tmp_path / "services.log").open("w", buffering=1) as log:
        async with running_system(settings, lambda name, line: print(name, line, file=log)) as running:
            yield running


@pytest.fixture
async def http(system: RunningSystem) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=system.gateway_url, timeout=DEADLINE_S) as client:
        yield client


def put_in_place_of(folder: Path, new: Path) -> None:
    """Exchange what is in a model's folder."""
    folder.rename(folder.with_name("before"))
    shutil.copytree(new, folder)


def asking(model: str, tokens: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


async def answer(http: httpx.AsyncClient, model: str, tokens: int) -> str:
    response = await http.post("/v1/completions", json=asking(model, tokens))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def test_what_comes_after_a_change_is_answered_by_the_new_weights(
    system: RunningSystem, http: httpx.AsyncClient, folder: Path, tiny_models: dict[str, Path]
) -> None:
    old, new = await answer(http, MODEL, LONG), await answer(http, REFERENCE, SHORT)
    assert not old.startswith(new)
    running = asyncio.create_task(answer(http, MODEL, LONG))
    async with connect_bus(system.nats_url, name="operator") as bus, watching(bus) as watcher:
        await watcher.until(lambda: any(load.running for report in watcher.reports for load in report.models))
        put_in_place_of(folder, tiny_models[AFTER])
        # As `prism up` does with the placement file: no need to wait until the store looks by itself.
        bucket = await bus.bucket(subjects.BUCKET_MODELS)
        await bucket.put(subjects.spec_key(MODEL), encode(ModelSpec(MODEL, str(folder), priority=1)))
        await watcher.until_state(MODEL, ModelState.COLD)
        assert await running == old
        assert await answer(http, MODEL, SHORT) == new
        assert watcher.state(REFERENCE) is ModelState.ACTIVE, "it is nobody else's concern"
