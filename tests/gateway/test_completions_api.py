"""POST /v1/completions over HTTP."""

from typing import Any

import httpx
import pytest
from tests.gateway.conftest import Stage
from tests.gateway.reading import joined, read_events
from tests.gateway.scripted_worker import Turn, saying

from prism.common.messages.generation import TokenLogprob

pytestmark = pytest.mark.core


async def complete(stage: Stage, **body: Any) -> httpx.Response:
    return await stage.http.post("/v1/completions", json={"model": "m", "prompt": "hello", **body})


async def test_answer_has_openais_shape_and_16_tokens_by_default(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids(" world"), finish="length"), "m")
    answer = (await complete(stage)).json()
    request = (await worker.turns.get()).request
    assert request.input_ids == stage.ids("hello")
    assert request.sampling.max_new_tokens == 16
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": " world", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["total_tokens"] == len(stage.ids("hello")) + len(stage.ids(" world"))


async def test_stream_ends_with_the_usage(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("one "), stage.ids("two")), "m")
    response = await complete(stage, stream=True, stream_options={"include_usage": True})
    events = read_events(response.text)
    assert joined(events) == "one two"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["usage"]["prompt_tokens"] == len(stage.ids("hello"))


async def test_every_chunk_tells_what_its_choice_has_used_so_far_if_asked(stage: Stage) -> None:
    await stage.register("m")
    parts = [stage.ids("one "), stage.ids("two")]
    await stage.worker(saying(*parts), "m")
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = read_events((await complete(stage, stream=True, stream_options=options)).text)
    completion = sum(map(len, parts))
    used = [event["usage"]["completion_tokens"] for event in events]
    assert used == [len(parts[0]), completion, completion]
    assert joined(events[:-1]) == "one two"
    assert {event["usage"]["prompt_tokens"] for event in events} == {len(stage.ids("hello"))}


@pytest.mark.parametrize(
    ("body", "streamed"), [({}, False), ({"stream": True}, True), ({"stop": ["two"]}, True)]
)
async def test_workers_are_told_whether_somebody_waits_for_each_token(
    stage: Stage, body: dict[str, Any], streamed: bool
) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("one")), "m")
    assert (await complete(stage, **body)).status_code == 200
    assert (await worker.turns.get()).request.streamed is streamed


async def echo_prompt(turn: Turn) -> None:
    await turn.send(turn.request.input_ids, finish="stop")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([40, 41], ["IDS"]),
        ([[40], [41, 42]], ["IDS", "IDS"]),
    ],
)
async def test_prompts_come_in_four_forms(stage: Stage, prompt: Any, texts: list[str]) -> None:
    await stage.register("m")
    worker = await stage.worker(echo_prompt, "m")
    answer = (await complete(stage, prompt=prompt)).json()
    if "IDS" in texts:
        lists = prompt if isinstance(prompt[0], list) else [prompt]
        texts = [stage.tokenizer.decode(tokens) for tokens in lists]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert worker.turns.qsize() == len(texts)


async def test_n_choices_of_each_prompt_stand_side_by_side(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(echo_prompt, "m")
    answer = (await complete(stage, prompt=["one", "two"], n=2)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two", "two"]
    assert answer["usage"]["prompt_tokens"] == len(stage.ids("one")) + len(stage.ids("two"))


async def test_logprobs_have_openais_shape(stage: Stage) -> None:
    await stage.register("m")
    a, b = stage.ids("a")[0], stage.ids("b")[0]

    async def script(turn: Turn) -> None:
        scores = [TokenLogprob(-0.5, [(a, -0.5), (b, -3.0)]), TokenLogprob(-1.5, [(a, -0.1), (b, -1.5)])]
        await turn.send([a, b], logprobs=scores, finish="stop")

    await stage.worker(script, "m")
    answer = (await complete(stage, logprobs=2)).json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -1.5],
        "top_logprobs": [{"a": -0.5, "b": -3.0}, {"a": -0.1, "b": -1.5}],
        "text_offset": [0, 1],
    }


async def test_tokens_that_are_no_character_are_spelled_as_bytes(stage: Stage) -> None:
    await stage.register("m")
    tokens = stage.ids("𐍈")

    async def script(turn: Turn) -> None:
        await turn.send(tokens, logprobs=[TokenLogprob(-1.0)] * len(tokens), finish="stop")

    await stage.worker(script, "m")
    choice = (await complete(stage, logprobs=0)).json()["choices"][0]
    assert choice["text"] == "𐍈"
    assert choice["logprobs"]["tokens"][0].startswith("bytes:\\xf0")
    assert choice["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 128, "prompt": ["a", "b"]}, "n"),
        ({"messages": []}, "messages"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(
    shared_stage: Stage, body: dict[str, Any], param: str
) -> None:
    response = await complete(shared_stage, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_harmless_defaults_are_taken(shared_stage: Stage) -> None:
    assert (await complete(shared_stage, echo=False, best_of=1, suffix=None)).status_code == 200
