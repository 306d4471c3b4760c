"""A model that no request wakes as things are says why, in /v1/models and to a client that waited for it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from nats.aio.msg import Msg
from tests.gateway.conftest import MakeStage, Stage
from tests.gateway.scripted_worker import saying

from prism.common import subjects
from prism.common.messages.codec import decode, encode
from prism.common.messages.explain import ExplainedNote, ExplainReply, ExplainRequest
from prism.gateway import obstacles
from prism.gateway.obstacles import HOLD_S, Obstacles
from prism.gateway.settings import Settings

pytestmark = pytest.mark.core

WHY = "waits for a worker; none is there with 2 GPU(s)"
PROMPT = {"model": "m", "prompt": "hello"}


@pytest.fixture(autouse=True)
def asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "ASK_S", 0.02)


@asynccontextmanager
async def scheduler(stage: Stage, notes: Mapping[str, str]) -> AsyncIterator[None]:
    """A test double of the leading scheduler, which says that nothing wakes these models."""

    async def answer(message: Msg) -> None:
        assert decode(message.data, ExplainRequest) == ExplainRequest(obstacles=True)
        told = [ExplainedNote(model, text) for model, text in notes.items()]
        await message.respond(encode(ExplainReply("scheduler-1", "lru", obstacles=told)))

    subscription = await stage.bus.subscribe(subjects.scheduler_explain(), answer)
    await stage.bus.flush()
    yield
    await subscription.unsubscribe()


async def test_models_do_not_claim_that_a_request_wakes_what_it_will_not(stage: Stage) -> None:
    await stage.register("m")
    await stage.register("other")
    await stage.register("awake")
    await stage.worker(saying([1]), "awake")
    notes = {"m": WHY, "awake": "waits for a further worker"}
    async with scheduler(stage, notes):
        await stage.ready("m", "unavailable")
        listed = (await stage.http.get("/v1/models")).json()["data"]
        assert {model["id"]: (model["state"], model["reason"]) for model in listed} == {
            "m": ("unavailable", WHY),
            "other": ("sleeping", "the next request wakes it"),
            "awake": ("ready", None),
        }
        notes.pop("m")
        await stage.ready("m", "sleeping")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_wait_in_vain_ends_with_the_reason(make_stage: MakeStage, *, stream: bool) -> None:
    stage = await make_stage(Settings(park_s=0.2))
    await stage.register("m")
    async with scheduler(stage, {"m": WHY}):
        await stage.ready("m", "unavailable")
        response = await stage.http.post("/v1/completions", json={**PROMPT, "stream": stream})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    error = response.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert "was not ready after 0 s" in error["message"]
    assert error["message"].endswith(f"try again later. The scheduler: {WHY}")


async def test_a_request_for_it_waits_all_the_same_and_goes_once_it_is_served(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("awake")))
    async with scheduler(stage, {"m": WHY}):
        await stage.ready("m", "unavailable")
        request = asyncio.create_task(stage.http.post("/v1/completions", json=PROMPT))
        await stage.eventually(
            "/metrics", lambda answer: 'prism_gateway_parked{model="m"} 1.0' in answer.text
        )
        await worker.serve("m")
        assert (await request).json()["choices"][0]["text"] == "awake"


def test_what_the_scheduler_said_holds_for_a_while() -> None:
    now = 100.0
    known = Obstacles(lambda: now)
    assert known.of("m") is None
    known.take(ExplainReply("scheduler-1", "lru", obstacles=[ExplainedNote("m", WHY)]))
    now += HOLD_S
    assert (known.of("m"), known.of("other")) == (WHY, None)
    now += 0.1
    assert known.of("m") is None
