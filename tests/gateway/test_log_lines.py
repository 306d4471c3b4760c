"""What a gateway's log says of requests that go wrong: found by the id that a client saw, with a remedy."""

import logging

import pytest
from tests.gateway.conftest import MakeStage, Stage
from tests.gateway.scripted_worker import Turn, hanging
from tests.gateway.test_replies import GATEWAY, message

from prism.common import subjects
from prism.common.errors import ErrorCode
from prism.gateway.replies import Replies
from prism.gateway.settings import Settings

PROMPT = {"model": "m", "prompt": "hello"}


def told(caplog: pytest.LogCaptureFixture, text: str) -> list[tuple[str, dict[str, str]]]:
    """Lines with `text`, and what they are about."""
    found = [record for record in caplog.records if text in record.getMessage()]
    return [(record.getMessage(), getattr(record, "about", {})) for record in found]


async def test_a_failed_request_is_found_by_the_id_in_its_answer(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        await turn.fail(ErrorCode.INTERNAL, "a wheel came off")

    worker = await stage.worker(script, "m")
    answer = await stage.http.post("/v1/completions", json=PROMPT)
    assert answer.status_code == 500
    ((line, names),) = told(caplog, "request failed")
    assert line == "request failed: a wheel came off; the worker's log says more"
    assert answer.headers["x-request-id"].startswith("cmpl-")
    assert names == {
        "request": answer.headers["x-request-id"],
        "rid": (await worker.turns.get()).request.rid,
        "model": "m",
        "worker": "worker-1",
    }


async def test_a_request_of_several_generations_is_found_by_the_id_of_each(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prism.gateway")
    await stage.register("m")

    async def script(turn: Turn) -> None:
        if turn.request.replayed_tokens:
            await turn.send(stage.ids("two"), finish="stop")
        else:
            await turn.send(stage.ids("one "))
            await turn.fail(ErrorCode.ENGINE_LOST, "engine gone", retry=True)

    await stage.worker(script, "m")
    answer = await stage.http.post("/generate", json={"model": "m", "text": ["a", "b"]})
    ids = [choice["meta_info"]["id"] for choice in answer.json()]
    assert sorted(names["request"] for _, names in told(caplog, "routing again")) == sorted(ids)


async def test_a_request_whose_model_never_comes_says_where_to_look(
    make_stage: MakeStage, caplog: pytest.LogCaptureFixture
) -> None:
    stage = await make_stage(Settings(park_s=0.05))
    await stage.register("m")
    answer = await stage.http.post("/v1/completions", json=PROMPT)
    ((line, names),) = told(caplog, "request failed")
    assert "`prism status`" in line
    assert names == {"request": answer.headers["x-request-id"], "model": "m"}


@pytest.mark.parametrize(
    ("draining", "line"), [(True, "a worker has retired"), (False, "a worker has gone silent")]
)
async def test_a_worker_that_said_that_it_would_go_is_not_called_silent(
    make_stage: MakeStage, caplog: pytest.LogCaptureFixture, *, draining: bool, line: str
) -> None:
    caplog.set_level(logging.INFO, "prism.gateway")
    stage = await make_stage(Settings(silence_s=0.5))
    worker = await stage.worker(hanging)
    worker.draining = draining
    await worker.report()
    await stage.until(lambda: stage.fleet.retiring() == ({"worker-1"} if draining else set()))
    worker.silent = True
    await stage.until(lambda: bool(told(caplog, "a worker has")))
    assert told(caplog, "a worker has") == [(line, {"worker": "worker-1"})]


async def test_each_request_that_a_drain_ends_is_told(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids("one "))

    await stage.worker(script, "m")
    async with stage.http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as answer:
        await stage.gateway.drain(0)
        ((line, names),) = told(caplog, "request ended with this gateway")
        assert "--drain-s" in line
        assert names == {"request": answer.headers["x-request-id"], "model": "m"}


async def test_frames_that_cannot_be_read_name_their_requests_and_workers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies = Replies()
    with replies.open("a1", "w1"), replies.open("b2", "w2"):
        await replies.take(message(subjects.reply_frames(GATEWAY), b'[{"rid": "b2", "seq": "?"}'))
    ((_, names),) = told(caplog, "unreadable frames")
    assert names == {"rid": "b2", "worker": "w2"}
    assert caplog.records[-1].levelno == logging.ERROR
