"""Requests survive what happens to workers: no token lost, none doubled, no error shown."""

import asyncio
from typing import Any

import httpx
import pytest
from tests.gateway.conftest import MakeStage, Stage
from tests.gateway.reading import joined, read_events, read_failed_events
from tests.gateway.scripted_worker import Script, Turn, hanging, saying

from prism.common.errors import ErrorCode
from prism.common.messages.load import ModelLoad
from prism.common.messages.models import ModelState
from prism.gateway.settings import Settings

pytestmark = pytest.mark.core

ONE, TWO, THREE = "one ", "two ", "three"


async def complete(stage: Stage, **body: Any) -> httpx.Response:
    return await stage.http.post(
        "/v1/completions", json={"model": "m", "prompt": "hello", "max_tokens": 50, **body}
    )


def rest_after(stage: Stage, *shown: str) -> Script:
    """A script that goes on behind the tokens that its prompt holds already."""

    async def script(turn: Turn) -> None:
        prompt = [*stage.ids("hello")]
        for text in shown:
            prompt += stage.ids(text)
        assert turn.request.input_ids == prompt
        assert turn.request.replayed_tokens == len(prompt) - len(stage.ids("hello"))
        assert turn.request.sampling.max_new_tokens == 50 - turn.request.replayed_tokens
        for text in (ONE, TWO, THREE)[len(shown) :]:
            await turn.send(stage.ids(text))
        await turn.send(finish="stop")

    return script


async def expect_all_of_it(stage: Stage, response: httpx.Response) -> None:
    events = read_events(response.text)
    assert joined(events) == ONE + TWO + THREE
    tokens = sum(len(stage.ids(text)) for text in (ONE, TWO, THREE))
    assert events[-1]["usage"] == {
        "prompt_tokens": len(stage.ids("hello")),
        "completion_tokens": tokens,
        "total_tokens": len(stage.ids("hello")) + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


async def test_moved_before_the_first_token_goes_elsewhere(stage: Stage) -> None:
    await stage.register("m")

    async def moved(turn: Turn) -> None:
        await turn.fail(ErrorCode.MOVED, retry=True)

    first = await stage.worker(moved, "m", name="worker-1")
    second = await stage.worker(rest_after(stage), "m", name="worker-2")
    await expect_all_of_it(stage, await complete(stage, **STREAM))
    rids = [(await worker.turns.get()).request.rid for worker in (first, second)]
    assert rids[0] != rids[1]


async def test_lost_engine_in_mid_stream_is_replayed_elsewhere(stage: Stage) -> None:
    await stage.register("m")

    async def dying(turn: Turn) -> None:
        await turn.send(stage.ids(ONE))
        await turn.send(stage.ids(TWO))
        await turn.fail(ErrorCode.ENGINE_LOST, retry=True)

    await stage.worker(dying, "m", name="worker-1")
    await stage.worker(rest_after(stage, ONE, TWO), "m", name="worker-2")
    await expect_all_of_it(stage, await complete(stage, **STREAM))


async def test_moved_by_the_only_worker_waits_for_another(stage: Stage) -> None:
    await stage.register("m")

    async def moved(turn: Turn) -> None:
        await turn.fail(ErrorCode.MOVED, retry=True)

    first = await stage.worker(moved, "m", name="worker-1")
    request = asyncio.create_task(complete(stage, **STREAM))
    await first.turns.get()
    await first.delete_route("m")
    await stage.worker(rest_after(stage), "m", name="worker-2")
    await expect_all_of_it(stage, await request)


async def test_nobody_listening_goes_elsewhere_at_once(stage: Stage) -> None:
    await stage.register("m")
    deaf = await stage.worker(hanging, "m", name="worker-1")
    await deaf.stop_listening("m")
    await stage.worker(rest_after(stage), "m", name="worker-2")
    async with asyncio.timeout(5):
        await expect_all_of_it(stage, await complete(stage, **STREAM))


async def test_gap_in_the_frames_is_replayed_and_the_old_attempt_cancelled(stage: Stage) -> None:
    await stage.register("m")

    async def gapping(turn: Turn) -> None:
        await turn.send(stage.ids(ONE))
        await turn.send(stage.ids(THREE), skip=1)

    first = await stage.worker(gapping, "m", name="worker-1")
    await stage.worker(rest_after(stage, ONE), "m", name="worker-2")
    await expect_all_of_it(stage, await complete(stage, **STREAM))
    assert await first.cancels.get() == (await first.turns.get()).request.rid


async def test_frame_that_comes_twice_counts_once(stage: Stage) -> None:
    await stage.register("m")

    async def stuttering(turn: Turn) -> None:
        await turn.send(stage.ids(ONE))
        await turn.send(stage.ids(ONE), skip=-1)
        await turn.send(stage.ids(TWO))
        await turn.send(stage.ids(THREE), finish="stop")

    await stage.worker(stuttering, "m")
    await expect_all_of_it(stage, await complete(stage, **STREAM))


async def test_stalled_worker_is_left_and_told(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(stall_s=1.0))
    await stage.register("m")

    async def stalling(turn: Turn) -> None:
        await turn.send(stage.ids(ONE))

    first = await stage.worker(stalling, "m", name="worker-1")
    await stage.worker(rest_after(stage, ONE), "m", name="worker-2")
    await expect_all_of_it(stage, await complete(stage, **STREAM))
    assert await first.cancels.get() == (await first.turns.get()).request.rid


async def test_request_that_waits_its_turn_is_not_taken_for_stalled(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(stall_s=1.0))
    await stage.register("m")

    async def busy_with_others(turn: Turn) -> None:
        await turn.send()
        # Twice as long as a worker may be silent, each step a quarter of that.
        for done in range(1, 9):
            worker.loads["m"] = ModelLoad("m", ModelState.ACTIVE, queued=1, generated_tokens=done)
            await worker.report()
            await asyncio.sleep(0.25)
        await turn.send(stage.ids("at last"), finish="stop")

    worker = await stage.worker(busy_with_others, "m")
    answer = await complete(stage)
    assert answer.json()["choices"][0]["text"] == "at last"
    assert worker.turns.qsize() == 1


async def test_request_that_no_worker_takes_up_is_sent_again(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(accept_s=1.0, stall_s=1000))
    await stage.register("m")

    async def busy_with_others(turn: Turn) -> None:
        for done in range(1, 300):
            first.loads["m"] = ModelLoad("m", ModelState.ACTIVE, queued=1, generated_tokens=done)
            await first.report()
            await asyncio.sleep(0.05)

    first = await stage.worker(busy_with_others, "m", name="worker-1")
    await stage.worker(rest_after(stage), "m", name="worker-2")
    async with asyncio.timeout(10):
        await expect_all_of_it(stage, await complete(stage, **STREAM))
    assert await first.cancels.get() == (await first.turns.get()).request.rid


async def test_worker_that_falls_silent_is_left(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(silence_s=1.0))
    await stage.register("m")

    async def dying(turn: Turn) -> None:
        await turn.send(stage.ids(ONE))
        first.silent = True

    first = await stage.worker(dying, "m", name="worker-1")
    await stage.worker(rest_after(stage, ONE), "m", name="worker-2")
    async with asyncio.timeout(10):
        await expect_all_of_it(stage, await complete(stage, **STREAM))


async def test_all_tokens_but_no_last_frame_is_no_reason_to_ask_again(stage: Stage) -> None:
    await stage.register("m")

    async def dying(turn: Turn) -> None:
        await turn.send([*stage.ids("yes"), 1])
        await turn.fail(ErrorCode.ENGINE_LOST, retry=True)

    worker = await stage.worker(dying, "m")
    choice = (await complete(stage)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("yes", "stop")
    assert worker.turns.qsize() == 1


async def test_request_that_takes_every_worker_down_ends(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(max_losses=2))
    await stage.register("m")

    async def dying(turn: Turn) -> None:
        await turn.fail(ErrorCode.ENGINE_LOST, "it burst", retry=True)

    worker = await stage.worker(dying, "m")
    response = await complete(stage)
    assert response.status_code == 503
    assert "lost 3 times in a row" in response.json()["error"]["message"]
    assert "it burst" in response.json()["error"]["message"]
    assert worker.turns.qsize() == 3


async def test_a_request_that_takes_engines_down_takes_no_other_with_it(stage: Stage) -> None:
    await stage.register("m")
    burst = asyncio.Event()

    async def shared_engine(turn: Turn) -> None:
        nonlocal burst
        if turn.request.sampling.seed == 13:
            # Its prefill, in which the others' are.
            await asyncio.wait({asyncio.ensure_future(burst.wait())}, timeout=0.04)
            burst.set()
            burst = asyncio.Event()
            await turn.fail(ErrorCode.ENGINE_LOST, "it burst", retry=True)
            return
        mine, left = burst, list(turn.request.sampling.max_new_tokens * stage.ids("a"))
        while left:
            # What a prefill or a step takes.
            done, _ = await asyncio.wait({asyncio.ensure_future(mine.wait())}, timeout=0.05)
            if done:
                await turn.fail(ErrorCode.ENGINE_LOST, "it burst", retry=True)
                return
            await turn.send([left.pop()], finish=None if left else "length")

    await stage.worker(shared_engine, "m")
    innocent = asyncio.create_task(complete(stage, max_tokens=60))
    poison = await complete(stage, seed=13)
    assert poison.status_code == 503
    response = await innocent
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == "a" * 60


async def test_final_error_has_its_status_before_the_first_token(stage: Stage) -> None:
    await stage.register("m")

    async def refusing(turn: Turn) -> None:
        await turn.fail(ErrorCode.INVALID_REQUEST, "no such bias")

    await stage.worker(refusing, "m")
    for stream in (False, True):
        response = await complete(stage, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "no such bias"


async def test_final_error_in_mid_stream_ends_it_without_done(stage: Stage) -> None:
    await stage.register("m")

    async def failing(turn: Turn) -> None:
        await turn.send(stage.ids(ONE))
        await turn.fail(ErrorCode.INTERNAL, "burst")

    await stage.worker(failing, "m")
    response = await complete(stage, stream=True)
    assert response.status_code == 200
    events, error = read_failed_events(response.text)
    assert joined(events) == ONE
    assert (error["message"], error["type"]) == ("burst", "server_error")


async def test_failure_of_one_choice_ends_the_others(stage: Stage) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        if turn.request.sampling.seed == 6:
            await turn.fail(ErrorCode.INTERNAL, "burst")

    worker = await stage.worker(script, "m")
    response = await complete(stage, n=3, seed=5)
    assert response.status_code == 500
    turns = [await worker.turns.get() for _ in range(3)]
    cancelled = {await worker.cancels.get() for _ in range(2)}
    assert cancelled == {turn.request.rid for turn in turns if turn.request.sampling.seed != 6}


async def test_deadline_ends_a_request_wherever_it_is(make_stage: MakeStage) -> None:
    stage = await make_stage(Settings(deadline_s=1.0))
    await stage.register("m")
    worker = await stage.worker(hanging, "m")
    response = await complete(stage)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["retry-after"]
    assert await worker.cancels.get() == (await worker.turns.get()).request.rid


async def test_requests_spread_over_the_workers(stage: Stage) -> None:
    await stage.register("m")
    workers = [await stage.worker(saying(stage.ids("x")), "m", name=f"worker-{n}") for n in range(2)]
    # A report that came in between would make its worker look idle again.
    for worker in workers:
        worker.silent = True
        worker.loads["m"] = ModelLoad("m", ModelState.ACTIVE, generated_tokens=1)
        await worker.report()
    fleet = stage.fleet
    await stage.until(lambda: all(fleet.tokens_done("m", worker.name) == 1 for worker in workers))
    await asyncio.gather(*(complete(stage) for _ in range(10)))
    assert [worker.turns.qsize() for worker in workers] == [5, 5]
