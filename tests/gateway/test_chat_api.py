"""POST /v1/chat/completions over HTTP."""

from typing import Any

import httpx
import pytest
from tests.gateway.conftest import CONTEXT_LENGTH, Stage
from tests.gateway.reading import joined, read_events
from tests.gateway.scripted_worker import Turn, saying

from prism.common.messages.generation import TokenLogprob
from prism.common.messages.models import ModelSpec

pytestmark = pytest.mark.core

HELLO = [{"role": "user", "content": "hello"}]


async def chat(stage: Stage, **body: Any) -> httpx.Response:
    return await stage.http.post("/v1/chat/completions", json={"model": "m", "messages": HELLO, **body})


async def test_answer_holds_the_text_and_the_usage(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("good "), stage.ids("morning")), "m")
    answer = (await chat(stage)).json()
    request = (await worker.turns.get()).request
    assert request.input_ids == stage.ids("<s>[user] hello\n[assistant] ")
    assert request.sampling.max_new_tokens == CONTEXT_LENGTH - len(request.input_ids)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "good morning", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    completion = len(stage.ids("good ")) + len(stage.ids("morning"))
    assert answer["usage"] == {
        "prompt_tokens": len(request.input_ids),
        "completion_tokens": completion,
        "total_tokens": len(request.input_ids) + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_stream_tells_role_text_ending_and_usage(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("good "), stage.ids("morning"), finish="length"), "m")
    response = await chat(stage, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response.text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(events) == "good morning"
    assert events[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert events[-2]["usage"] is None
    assert events[-1]["choices"] == []
    completion = len(stage.ids("good ")) + len(stage.ids("morning"))
    assert events[-1]["usage"]["completion_tokens"] == completion
    assert len({event["id"] for event in events}) == 1


async def test_every_chunk_tells_what_its_choice_has_used_so_far_if_asked(stage: Stage) -> None:
    await stage.register("m")
    parts = [stage.ids("good "), stage.ids("morning")]
    worker = await stage.worker(saying(*parts, finish="length"), "m")
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = read_events((await chat(stage, stream=True, stream_options=options, n=2)).text)
    prompt = len((await worker.turns.get()).request.input_ids)
    completion = sum(map(len, parts))
    for index in (0, 1):
        own = [event["usage"] for event in events[:-1] if event["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in own] == [0, len(parts[0]), completion, completion]
        assert {usage["total_tokens"] - usage["completion_tokens"] for usage in own} == {prompt}
        assert not any("prompt_tokens_details" in usage for usage in own), "unknown before the end"
    assert joined([event for event in events[:-1] if event["choices"][0]["index"] == 0]) == "good morning"
    assert events[-1]["usage"]["completion_tokens"] == 2 * completion
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_stream_without_usage_says_nothing_of_it(stage: Stage) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("hi")), "m")
    assert not any("usage" in event for event in read_events((await chat(stage, stream=True)).text))


async def test_character_split_over_frames_comes_whole(stage: Stage) -> None:
    await stage.register("m")
    tokens = stage.ids("a𐍈b")
    await stage.worker(saying(*[[token] for token in tokens]), "m")
    events = read_events((await chat(stage, stream=True)).text)
    assert joined(events) == "a𐍈b"
    assert "\ufffd" not in str(events)


async def test_end_token_counts_and_is_not_shown(stage: Stage) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        await turn.send([*stage.ids("yes"), 1], finish="stop", matched=1)

    await stage.worker(script, "m")
    answer = (await chat(stage)).json()
    assert answer["choices"][0]["message"]["content"] == "yes"
    assert answer["usage"]["completion_tokens"] == len(stage.ids("yes")) + 1


async def test_stop_string_over_frames_cuts_the_text_and_cancels_the_work(stage: Stage) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        for word in ("one E", "N", "D two"):
            await turn.send(stage.ids(word))

    worker = await stage.worker(script, "m")
    events = read_events((await chat(stage, stream=True, stop=["never", "END"])).text)
    assert joined(events) == "one "
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    turn = await worker.turns.get()
    assert await worker.cancels.get() == turn.request.rid


async def test_sampling_parameters_reach_the_worker(stage: Stage) -> None:
    await stage.register(ModelSpec("m", "/nowhere", priority=3, ttft_slo_ms=500, tpot_slo_ms=50))
    worker = await stage.worker(saying(stage.ids("x")), "m")
    sampling = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 42,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "stop_token_ids": [9],
        "logit_bias": {"5": -100},
    }
    response = await chat(stage, **sampling, max_completion_tokens=6, min_tokens=2, user="someone")
    assert response.status_code == 200
    request = (await worker.turns.get()).request
    for name in sampling.keys() - {"stop_token_ids"}:
        assert getattr(request.sampling, name) == sampling[name]
    assert request.sampling.stop_token_ids == (9,)
    assert (request.sampling.max_new_tokens, request.sampling.min_new_tokens) == (6, 2)
    assert (request.priority, request.ttft_slo_ms, request.tpot_slo_ms) == (3, 500, 50)
    assert request.top_logprobs is None
    assert 0 < request.deadline_s <= 300
    assert len(request.rid) == 32


async def test_headers_set_the_objectives_of_a_request(stage: Stage) -> None:
    await stage.register(ModelSpec("m", "/nowhere", ttft_slo_ms=500, tpot_slo_ms=50))
    worker = await stage.worker(saying(stage.ids("x")), "m")
    body = {"model": "m", "messages": HELLO}
    headers = {"X-SLO-TTFT-Ms": "120.5", "x-slo-tpot-ms": "9"}
    await stage.http.post("/v1/chat/completions", json=body, headers=headers)
    request = (await worker.turns.get()).request
    assert (request.ttft_slo_ms, request.tpot_slo_ms) == (120.5, 9)
    wrong = await stage.http.post("/v1/chat/completions", json=body, headers={"X-SLO-TTFT-Ms": "soon"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "X-SLO-TTFT-Ms"


async def test_n_choices_are_independent_and_count_the_prompt_once(stage: Stage) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids(f"seed {turn.request.sampling.seed}"), finish="stop")

    await stage.worker(script, "m")
    answer = (await chat(stage, n=3, seed=7)).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["seed 7", "seed 8", "seed 9"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == len(stage.ids("<s>[user] hello\n[assistant] "))
    assert answer["usage"]["completion_tokens"] == sum(len(stage.ids(text)) for text in texts)
    events = read_events((await chat(stage, n=3, seed=7, stream=True)).text)
    assert [joined(events, index) for index in range(3)] == texts


async def test_seeds_are_random_when_none_is_given(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("x")), "m")
    for _ in range(2):
        await chat(stage)
    seeds = [(await worker.turns.get()).request.sampling.seed for _ in range(2)]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**31 for seed in seeds)


async def test_logprobs_have_openais_shape(stage: Stage) -> None:
    await stage.register("m")
    first, second = stage.ids("a"), stage.ids("é")

    async def script(turn: Turn) -> None:
        assert turn.request.top_logprobs == 1
        await turn.send(first, logprobs=[TokenLogprob(-0.5, [(first[0], -0.5)])])
        await turn.send(
            second, logprobs=[TokenLogprob(-1.0, [(token, -2.0)]) for token in second], finish="stop"
        )

    await stage.worker(script, "m")
    answer = (await chat(stage, logprobs=True, top_logprobs=1)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "aé"
    events = read_events((await chat(stage, logprobs=True, top_logprobs=1, stream=True)).text)
    streamed = [
        entry for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_text_parts_are_joined_and_developers_speak_as_the_system(stage: Stage) -> None:
    await stage.register("m")
    worker = await stage.worker(saying(stage.ids("x")), "m")
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "go on", "name": "me"},
    ]
    assert (await chat(stage, messages=messages)).status_code == 200
    prompt = "<s>[system] be brief\n[user] one\ntwo\n[assistant] ok\n[user] go on\n[assistant] "
    assert (await worker.turns.get()).request.input_ids == stage.ids(prompt)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"temperature": 2.5}, "temperature", "at least 0 and at most 2; got 2.5"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"top_k": -2}, "top_k", "or -1"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": True}, "n", "got `bool`"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "more than the 3"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "empty"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids", "100000"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "at most 100"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "system, developer"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "string"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "only text",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"audio": {"voice": "alloy"}}, "audio", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"stream_options": {"colour": 1}}, "stream_options.colour", "unknown"),
        ({"temprature": 1}, "temprature", "unknown parameter"),
        ({"model": 5}, "model", "expected `str`"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(
    shared_stage: Stage, body: dict[str, Any], param: str, says: str
) -> None:
    response = await chat(shared_stage, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_harmless_defaults_are_taken(shared_stage: Stage) -> None:
    response = await chat(
        shared_stage,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        store=False,
        metadata={"a": "b"},
        user="u",
        parallel_tool_calls=True,
        service_tier="auto",
        modalities=["text"],
        logit_bias={},
        stop=None,
        temperature=None,
    )
    assert response.status_code == 200, response.text


async def test_unknown_model_is_not_found(shared_stage: Stage) -> None:
    response = await chat(shared_stage, model="other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "m" in response.json()["error"]["message"]


async def test_too_long_a_prompt_is_told_with_both_lengths(shared_stage: Stage) -> None:
    messages = [{"role": "user", "content": "z" * 500}]
    response = await chat(shared_stage, messages=messages)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    prompt = len(shared_stage.ids(f"<s>[user] {'z' * 500}\n[assistant] "))
    assert str(CONTEXT_LENGTH) in error["message"]
    assert str(prompt) in error["message"]


async def test_body_that_is_no_json_is_refused(shared_stage: Stage) -> None:
    response = await shared_stage.http.post("/v1/chat/completions", content=b"{nope")
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]
