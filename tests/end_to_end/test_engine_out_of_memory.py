"""An engine that gets no more memory ends by its allocator's error; its requests go on in the next one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import httpx
import msgspec
import psutil
import pytest
from nats.aio.msg import Msg
from tests.chaos.campaign import learn_answers
from tests.chaos.stage import prompts_of
from tests.chaos.traffic import COMPLETE, Traffic
from tests.end_to_end.observing import DEADLINE_S, engine_processes, watching

from prism.cli.system import SystemSettings, running_system
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.messages.models import InitialPlacement, ModelSpec

pytestmark = pytest.mark.engine

MODEL = "tiny-llama"
PROMPTS, PROMPT_TOKENS = 8, 2000
# Several prompts in one step, for which what the allocator has kept of freed memory is far too little: they
# are sent while the engine is suspended, and none is held back meanwhile.
LONG_STEPS = {
    "PRISM_CHUNKED_PREFILL_TOKENS": "8192",
    "PRISM_ADMISSION": "first_come",
    "PRISM_ENGINE_STALL_S": str(DEADLINE_S),
}
KV_GB = 0.13


async def long_prompt(client: httpx.AsyncClient, token: int) -> int:
    """The status of a request that is over with its first step."""
    body = {
        "model": MODEL,
        "input_ids": [token] * PROMPT_TOKENS,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
    }
    response = await client.post("/generate", json=body)
    if response.status_code == 200:
        assert len(response.json()["output_ids"]) == 1
    return response.status_code


@asynccontextmanager
async def messages_seen(bus: Bus, subject: str) -> AsyncIterator[asyncio.Queue[Msg]]:
    """What is said on `subject` from now on."""
    seen: asyncio.Queue[Msg] = asyncio.Queue()
    subscription = await bus.subscribe(subject, seen.put, inline=True)
    await bus.flush()
    try:
        yield seen
    finally:
        await subscription.unsubscribe()


async def test_requests_of_an_engine_out_of_memory_are_finished_by_the_next_one(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    placement = tmp_path / "placement.json"
    where = [InitialPlacement([0], on=True, max_memory_pool_size=KV_GB)]
    spec = ModelSpec(MODEL, str(tiny_models[MODEL]), init_placements=where)
    placement.write_bytes(msgspec.json.encode([spec]))
    settings = SystemSettings(
        placement=placement,
        worker_memory_gb=0.3,
        store_memory_gb=0.5,
        image_dir=tmp_path / "images",
        environment=LONG_STEPS,
    )
    lines: list[str] = []
    exported = asyncio.Event()

    def on_line(service: str, line: str) -> None:
        lines.append(f"{service} {line}")
        if "image exported" in line:
            exported.set()

    async with (
        running_system(settings, on_line) as system,
        httpx.AsyncClient(base_url=system.gateway_url, timeout=DEADLINE_S) as client,
        connect_bus(system.nats_url, name="test") as bus,
        watching(bus) as watcher,
    ):
        (question, *_) = await learn_answers(system.gateway_url, prompts_of([tiny_models[MODEL]]))
        await asyncio.wait_for(exported.wait(), DEADLINE_S)
        engine = engine_processes(system)[MODEL]
        # Far below what it has: of what it has given back since (as the export's mappings) it gets nothing.
        limit = engine.memory_info().vms // 2
        engine.rlimit(psutil.RLIMIT_AS, (limit, limit))
        # A thread's heap grows within addresses that it has.
        engine.rlimit(psutil.RLIMIT_DATA, (0, 0))
        asking = Traffic(lambda: [system.gateway_url], [], 0)
        async with messages_seen(bus, subjects.replies("*")) as frames:
            stream = asyncio.create_task(asking.ask(question, Random(0)))
            await asyncio.wait_for(frames.get(), DEADLINE_S)
        engine.suspend()
        try:
            async with messages_seen(bus, subjects.request(MODEL, "*")) as seen, asyncio.timeout(DEADLINE_S):
                prompts = [asyncio.create_task(long_prompt(client, 5 + index)) for index in range(PROMPTS)]
                for _ in range(PROMPTS):
                    await seen.get()
            # The worker has them as well: it has reported since.
            reports = len(watcher.reports)
            await watcher.until(lambda: len(watcher.reports) > reports + 1)
        finally:
            engine.resume()
        statuses = await asyncio.gather(*prompts)
        exchange = await asyncio.wait_for(stream, DEADLINE_S)
        successor = engine_processes(system)[MODEL]
    told = [line for line in lines if "engine ended" in line]
    assert len(told) == 1, lines
    assert "can't allocate memory" in told[0] or "MemoryError" in told[0]
    assert "(exit status 3)" in told[0]
    assert statuses == [200] * PROMPTS
    assert (exchange.outcome, exchange.refused, exchange.breaks) == (COMPLETE, 0, [])
    assert successor != engine
