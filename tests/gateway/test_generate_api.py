"""POST /generate over HTTP, as SGLang's clients use it."""

from typing import Any

import httpx
import pytest
from tests.gateway.conftest import Stage
from tests.gateway.reading import read_events
from tests.gateway.scripted_worker import Turn, saying

from prism.common.messages.generation import TokenLogprob

pytestmark = pytest.mark.core


async def generate(stage: Stage, **body: Any) -> httpx.Response:
    return await stage.http.post("/generate", json=body)


async def test_answer_has_sglangs_shape(stage: Stage) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        await turn.send([*stage.ids("yes"), 1], finish="stop", matched=1, cached=2)

    worker = await stage.worker(script, "m")
    answer = (await generate(stage, text="hello", slo=0.25)).json()
    request = (await worker.turns.get()).request
    assert request.sampling.max_new_tokens == 128
    assert request.ttft_slo_ms == 250
    assert answer["text"] == "yes"
    assert answer["output_ids"] == [*stage.ids("yes"), 1]
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": 1}
    assert meta["prompt_tokens"] == len(stage.ids("hello"))
    assert meta["completion_tokens"] == len(answer["output_ids"])
    assert meta["cached_tokens"] == 2
    assert meta["e2e_latency"] > 0


async def test_stream_repeats_all_the_text_so_far(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("one "), stage.ids("two"), finish="length"), "m")
    events = read_events((await generate(stage, text="hello", model="m", stream=True)).text)
    # Frames that come together make one event.
    assert [event["text"] for event in events] in (["one ", "one two"], ["one two"])
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])
    tokens = len(stage.ids("one ")) + len(stage.ids("two"))
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": tokens}


async def test_batches_are_lists_and_streams_of_them_are_numbered(stage: Stage) -> None:
    await stage.register("m")

    async def echo(turn: Turn) -> None:
        await turn.send(turn.request.input_ids, finish="stop")

    await stage.worker(echo, "m")
    answer = (await generate(stage, input_ids=[stage.ids("one"), stage.ids("two")])).json()
    assert [entry["text"] for entry in answer] == ["one", "two"]
    answer = (await generate(stage, text=["one"], sampling_params={"n": 2})).json()
    assert [entry["text"] for entry in answer] == ["one", "one"]
    assert (await generate(stage, input_ids=stage.ids("one"))).json()["text"] == "one"
    events = read_events((await generate(stage, text=["one", "two"], stream=True)).text)
    assert {event["index"]: event["text"] for event in events} == {0: "one", 1: "two"}


async def test_stop_string_is_named(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("one. two")), "m")
    answer = (await generate(stage, text="hello", sampling_params={"stop": "."})).json()
    assert answer["text"] == "one"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "."}


async def test_logprobs_have_sglangs_shape(stage: Stage) -> None:
    await stage.register("m")
    token = stage.ids("a")[0]

    async def script(turn: Turn) -> None:
        scores = [TokenLogprob(-0.5, [(token, -0.5), (7, -2.0)]), TokenLogprob(-0.1, [(1, -0.1), (7, -4.0)])]
        await turn.send([token, 1], logprobs=scores, finish="stop", matched=1)

    await stage.worker(script, "m")
    meta = (await generate(stage, text="hello", return_logprob=True, top_logprobs_num=2)).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, token, None], [-0.1, 1, None]]
    assert meta["output_top_logprobs"] == [
        [[-0.5, token, None], [-2.0, 7, None]],
        [[-0.1, 1, None], [-4.0, 7, None]],
    ]


async def test_sampling_parameters_reach_the_worker(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("x")), "m")
    params = {"max_new_tokens": 5, "min_new_tokens": 1, "sampling_seed": 3, "temperature": 0, "top_k": 4}
    assert (await generate(stage, text="hello", sampling_params=params)).status_code == 200
    sampling = (await worker.turns.get()).request.sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed) == (5, 1, 3)
    assert (sampling.temperature, sampling.top_k) == (0, 4)


async def test_what_sglangs_benchmark_always_sends_may_ask_for_nothing(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("yes")), "m")
    idle = {"lora_path": None, "return_logprob": False, "return_routed_experts": False}
    answer = await generate(stage, text="hello", logprob_start_len=-1, **idle)
    assert answer.json()["text"] == "yes"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"text": "a", "slo": 0}, "slo"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "return_routed_experts": True}, "return_routed_experts"),
        ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"regex": "x"}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"stop": [""]}}, "sampling_params.stop"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(
    shared_stage: Stage, body: dict[str, Any], param: str
) -> None:
    response = await generate(shared_stage, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_model_must_be_named_where_there_are_several(stage: Stage) -> None:
    await stage.register("m")
    await stage.register("other")
    response = await generate(stage, text="hello")
    assert response.status_code == 400
    assert "m, other" in response.json()["error"]["message"]
