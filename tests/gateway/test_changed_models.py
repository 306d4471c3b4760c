"""A model whose files change: no request gets an answer of a version that its tokens are not of."""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from tests.gateway.conftest import Stage
from tests.gateway.reading import joined, live_events, read_events, read_failed_events
from tests.gateway.scripted_worker import ScriptedWorker, Turn, saying

from prism.common.errors import ErrorCode
from prism.common.messages.load import ModelLoad
from prism.common.messages.models import ModelState

pytestmark = pytest.mark.core

OLD = ModelLoad("m", ModelState.ACTIVE, version="old")
NEW = msgspec.structs.replace(OLD, version="new")


async def complete(stage: Stage, **body: Any) -> httpx.Response:
    return await stage.http.post("/v1/completions", json={"model": "m", "prompt": "hello", **body})


async def has(worker: ScriptedWorker, load: ModelLoad, stage: Stage) -> None:
    """Have the gateway know that `worker` has an engine of that version."""
    worker.loads["m"] = load
    await worker.report()
    await stage.until(
        lambda: (
            stage.fleet.choose("m", version=load.version) == worker.name
            and stage.fleet.choose("m", version="neither") is None
        )
    )


async def until_parked(stage: Stage) -> None:
    await stage.eventually("/metrics", lambda answer: 'prism_gateway_parked{model="m"} 1.0' in answer.text)


async def test_a_request_names_the_version_whose_tokens_it_has(stage: Stage) -> None:
    await stage.register("m", version="new")
    worker = await stage.worker(saying(stage.ids("one"), finish="stop"), "m")
    assert (await complete(stage)).status_code == 200
    assert (await worker.turns.get()).request.version == "new"


async def test_a_request_waits_for_an_engine_of_its_version(stage: Stage) -> None:
    await stage.register("m", version="new")
    worker = await stage.worker(saying(stage.ids("one"), finish="stop"), "m")
    await has(worker, OLD, stage)
    request = asyncio.create_task(complete(stage))
    await until_parked(stage)
    assert worker.turns.empty()
    await has(worker, NEW, stage)
    assert (await request).status_code == 200


async def test_what_a_worker_refuses_as_of_another_version_goes_on_once_it_is_there(stage: Stage) -> None:
    await stage.register("m", version="new")

    async def another_version(turn: Turn) -> None:
        await turn.fail(ErrorCode.MOVED, "another version", retry=True)

    worker = await stage.worker(another_version, "m")
    request = asyncio.create_task(complete(stage))
    await worker.turns.get()
    worker.script = saying(stage.ids("one"), finish="stop")
    await has(worker, NEW, stage)
    assert (await request).status_code == 200


async def test_a_request_that_waits_while_its_model_changes_is_told_to_ask_again(stage: Stage) -> None:
    await stage.register("m", version="old")
    request = asyncio.create_task(complete(stage))
    await until_parked(stage)
    await stage.register("m", version="new")
    answer = await request
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "moved")
    assert "changed while the request waited or ran; ask again" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers


async def test_a_request_of_the_old_version_ends_well_where_it_runs(stage: Stage) -> None:
    await stage.register("m", version="old")
    go_on = asyncio.Event()

    async def halting(turn: Turn) -> None:
        await turn.send(stage.ids("one "))
        await go_on.wait()
        await turn.send(stage.ids("two "), finish="stop")

    worker = await stage.worker(halting, "m")
    await has(worker, OLD, stage)
    async with stage.http.stream(
        "POST", "/v1/completions", json={"model": "m", "prompt": "hello", "stream": True}
    ) as answer:
        events = live_events(answer)
        told = [await anext(events)]
        await stage.register("m", version="new")
        waiting = asyncio.create_task(complete(stage))
        await until_parked(stage)
        go_on.set()
        told += [event async for event in events]
    assert joined(read_events("\n\n".join(told))) == "one two "
    waiting.cancel()


async def test_a_request_whose_engine_goes_is_not_carried_on_by_another_version(stage: Stage) -> None:
    await stage.register("m", version="old")

    async def released(turn: Turn) -> None:
        await turn.send(stage.ids("one "))
        await stage.register("m", version="new")
        worker.loads["m"] = NEW
        await worker.report()
        await stage.until(lambda: stage.fleet.choose("m", version="old") is None)
        await turn.fail(ErrorCode.ENGINE_LOST, "it was released", retry=True)

    worker = await stage.worker(released, "m")
    await has(worker, OLD, stage)
    answer = await complete(stage, stream=True)
    events, error = read_failed_events(answer.text)
    assert joined(events) == "one "
    assert error["code"] == "moved"
    assert worker.turns.qsize() == 1
