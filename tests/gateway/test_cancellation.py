"""A client that leaves ends its work at once, wherever it stands."""

import asyncio
import time
from typing import Any

import pytest
from tests.gateway.conftest import Stage
from tests.gateway.reading import live_events
from tests.gateway.scripted_worker import Turn, hanging

from prism.common import subjects
from prism.common.messages.codec import decode
from prism.common.messages.load import DemandReport

pytestmark = pytest.mark.core

PROMPT = {"model": "m", "prompt": "hello"}
SOON_S = 0.8
"""Far below any timer that could end the work instead, with room for a busy machine."""


async def test_leaving_a_stream_cancels_it(stage: Stage) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids("one"))

    worker = await stage.worker(script, "m")
    async with stage.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        await anext(live_events(response))
    left = time.monotonic()
    turn = await worker.turns.get()
    assert await asyncio.wait_for(worker.cancels.get(), 5) == turn.request.rid
    assert time.monotonic() - left < SOON_S


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_while_waiting_for_an_answer_cancels_it(stage: Stage, n: int) -> None:
    await stage.register("m")
    worker = await stage.worker(hanging, "m")
    request = asyncio.create_task(stage.http.post("/v1/completions", json={**PROMPT, "n": n}))
    turns = [await worker.turns.get() for _ in range(n)]
    request.cancel()
    left = time.monotonic()
    cancelled = {await asyncio.wait_for(worker.cancels.get(), 5) for _ in range(n)}
    assert time.monotonic() - left < SOON_S
    assert cancelled == {turn.request.rid for turn in turns}


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_while_parked_takes_the_demand_back(stage: Stage, stream: bool) -> None:
    await stage.register("m")
    reports: asyncio.Queue[int] = asyncio.Queue()

    async def note(message: Any) -> None:
        report = decode(message.data, DemandReport)
        reports.put_nowait(sum(entry.parked for entry in report.models))

    await stage.bus.subscribe(subjects.demand("*"), note, inline=True)
    await stage.bus.flush()
    request = asyncio.create_task(stage.http.post("/v1/completions", json={**PROMPT, "stream": stream}))
    async with asyncio.timeout(5):
        while await reports.get() != 1:
            continue
        request.cancel()
        left = time.monotonic()
        while await reports.get() != 0:
            continue
    assert time.monotonic() - left < SOON_S
    metrics = (await stage.http.get("/metrics")).text
    assert 'prism_gateway_requests_total{endpoint="/v1/completions",model="m",status="499"} 1.0' in metrics
    assert "prism_gateway_in_flight 0.0" in metrics
