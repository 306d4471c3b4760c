"""Requests for a sleeping model wait, tell of themselves in few reports, and go together."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from tests.gateway.conftest import MakeStage, Stage
from tests.gateway.reading import joined, live_events
from tests.gateway.scripted_worker import Turn, hanging, saying

from prism.common import subjects
from prism.common.errors import ErrorCode
from prism.common.messages.codec import decode
from prism.common.messages.load import DemandReport, ModelLoad
from prism.common.messages.models import ModelState
from prism.gateway import demand
from prism.gateway.settings import Settings

pytestmark = pytest.mark.core


async def complete(stage: Stage, **body: Any) -> httpx.Response:
    return await stage.http.post("/v1/completions", json={"model": "m", "prompt": "hello", **body})


@asynccontextmanager
async def demand_reports(stage: Stage) -> AsyncIterator[asyncio.Queue[DemandReport]]:
    reports: asyncio.Queue[DemandReport] = asyncio.Queue()

    async def note(message: Any) -> None:
        reports.put_nowait(decode(message.data, DemandReport))

    subscription = await stage.bus.subscribe(subjects.demand("*"), note, inline=True)
    await stage.bus.flush()
    yield reports
    await subscription.unsubscribe()


def parked(report: DemandReport) -> int:
    return sum(entry.parked for entry in report.models)


async def test_first_parked_request_is_told_at_once(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is told by the clock.
    monkeypatch.setattr(demand, "INTERVAL_S", 1000.0)
    stage = await make_stage(Settings())
    await stage.register("m")
    async with demand_reports(stage) as reports, asyncio.timeout(30):
        request = asyncio.create_task(complete(stage))
        while parked(report := await reports.get()) == 0:
            continue
        assert report.gateway == stage.gateway.name
        assert report.models[0].model == "m"
        assert report.models[0].arrivals_per_s > 0
        request.cancel()


async def test_200_wait_together_with_few_reports_and_all_go_at_one_route(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("awake")))
    limits = httpx.Limits(max_connections=None)
    async with (
        demand_reports(stage) as reports,
        httpx.AsyncClient(base_url=stage.gateway.url, timeout=60, limits=limits) as http,
        asyncio.timeout(60),
        asyncio.TaskGroup() as tasks,
    ):
        began = time.monotonic()
        body = {"model": "m", "prompt": "hello"}
        requests = [tasks.create_task(http.post("/v1/completions", json=body)) for _ in range(200)]
        seen = [await reports.get()]
        while parked(seen[-1]) < 200:
            seen.append(await reports.get())
        # The clock's reports, and those for the first one and for each doubling.
        assert len(seen) <= time.monotonic() - began + 12
        assert worker.turns.qsize() == 0
        await worker.serve("m")
        answers = [await request for request in requests]
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {"awake"}
        while parked(await reports.get()) > 0:
            continue
    assert worker.turns.qsize() == 200


async def test_model_out_of_demand_is_left_out_of_the_report(stage: Stage) -> None:
    await stage.register("m")
    async with demand_reports(stage) as reports, asyncio.timeout(5):
        assert (await reports.get()).models == []


async def test_wait_ends_with_retry_after(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(park_s=0.2))
    await stage.register("m")
    for stream in (False, True):
        response = await complete(stage, stream=stream)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        error = response.json()["error"]
        assert error["code"] == "deadline_exceeded"
        assert "'m'" in error["message"]


async def test_too_many_waiting_are_told_to_come_back(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(park_per_model=1))
    await stage.register("m")
    async with demand_reports(stage) as reports, asyncio.timeout(5):
        first = asyncio.create_task(complete(stage))
        while parked(await reports.get()) == 0:
            continue
        response = await complete(stage)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["type"] == "rate_limit_error"
        first.cancel()


async def test_stream_in_progress_waits_for_its_model_however_many_others_do(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(park_per_model=1, park_total=1))
    await stage.register("m")
    doze = asyncio.Event()

    async def script(turn: Turn) -> None:
        if turn.request.replayed_tokens:
            await turn.send(stage.ids("two"), finish="stop")
        elif worker.turns.qsize() == 1:
            await turn.send(stage.ids("one "))
            await doze.wait()
            await turn.fail(ErrorCode.MOVED, retry=True)
        else:
            await turn.send(stage.ids("new"), finish="stop")

    worker = await stage.worker(script, "m")
    body = {"model": "m", "prompt": "hello", "stream": True}
    async with demand_reports(stage) as reports, asyncio.timeout(10):
        async with stage.http.stream("POST", "/v1/completions", json=body) as response:
            events = live_events(response)
            told = [await anext(events)]
            await worker.delete_route("m")
            await stage.ready("m", "sleeping")
            waiting = asyncio.create_task(complete(stage))
            while parked(await reports.get()) == 0:
                continue
            doze.set()
            while parked(await reports.get()) < 2:
                continue
            await worker.put_route("m")
            told += [event async for event in events]
        assert (await waiting).json()["choices"][0]["text"] == "new"
    assert told.pop() == "[DONE]"
    assert joined([json.loads(event) for event in told]) == "one two"


async def test_model_that_fails_to_wake_ends_the_wait_with_the_reason(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(hanging)
    async with demand_reports(stage) as reports, asyncio.timeout(5):
        request = asyncio.create_task(complete(stage))
        while parked(await reports.get()) == 0:
            continue
        worker.loads["m"] = ModelLoad("m", ModelState.FAILED, failure="its weights do not fit")
        await worker.report()
        response = await request
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_failed"
    assert "its weights do not fit" in response.json()["error"]["message"]
    again = await complete(stage)
    assert again.status_code == 503
    model = (await stage.http.get("/v1/models/m")).json()
    assert model["state"] == "failed"
    assert "its weights do not fit" in model["reason"]


async def test_model_that_failed_a_while_ago_is_tried_again_by_the_next_request(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("mended")))
    worker.loads["m"] = ModelLoad("m", ModelState.FAILED, state_s=60.0, failure="its weights do not fit")
    await worker.report()
    await stage.ready("m", "failed")
    async with demand_reports(stage) as reports, asyncio.timeout(5):
        request = asyncio.create_task(complete(stage))
        while parked(await reports.get()) == 0:
            continue
        await worker.serve("m")
        assert (await request).json()["choices"][0]["text"] == "mended"


async def test_model_whose_folder_cannot_be_used_is_refused(stage: Stage) -> None:
    await stage.register("m", error="config.json is missing")
    response = await complete(stage)
    assert response.status_code == 503
    assert "config.json is missing" in response.json()["error"]["message"]


async def test_route_of_a_worker_not_heard_of_yet_is_used_when_it_reports(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("here")))
    worker.silent = True
    await worker.listen("m")
    await worker.put_route("m")
    async with demand_reports(stage) as reports, asyncio.timeout(10):
        request = asyncio.create_task(complete(stage))
        while parked(await reports.get()) == 0:
            continue
        worker.silent = False
        assert (await request).json()["choices"][0]["text"] == "here"
