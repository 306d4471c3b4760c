"""What a client does wrong, line by line: the status, the field that is named, what the message says.

Every refusal has OpenAI's shape, `{"error": {message, type, param, code}}`.
"""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gateway.conftest import CONTEXT_LENGTH, Stage, open_stage

from prism.cli.nats_server import nats_server
from prism.common.bus import connect_bus
from prism.common.messages.models import TokenizerBundle
from prism.gateway.settings import Settings

pytestmark = pytest.mark.core

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
LONG = "hello " * 1000
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hello"}]},
    COMPLETIONS: {"model": "m", "prompt": "hello"},
    GENERATE: {"model": "m", "text": "hello"},
}


def refusal(response: httpx.Response, status: int) -> dict[str, str]:
    """The error of a refusal, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def users(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


WRONG_FIELDS = [
    # Wrong types
    (COMPLETIONS, {"model": 5}, "model", "expected `str`, got `int`"),
    (COMPLETIONS, {"stream": "yes"}, "stream", "expected `bool | null`"),
    (COMPLETIONS, {"temperature": "hot"}, "temperature", "expected `float | null`"),
    (COMPLETIONS, {"prompt": [["x"]]}, "prompt[0][0]", "expected `int`, got `str`"),
    (COMPLETIONS, {"prompt": [1, 2, "x"]}, "prompt", "not a mixture"),
    (COMPLETIONS, {"max_tokens": 1.5}, "max_tokens", "expected `int | null`"),
    (CHAT, {"messages": "hello"}, "messages", "expected `array`"),
    (CHAT, {"messages": [*users("a"), {"role": 5, "content": "a"}]}, "messages[1].role", "expected `str`"),
    (
        CHAT,
        {"messages": users("a", [{"type": "text", "text": 5}])},
        "messages[1].content[0].text",
        "got `int`",
    ),
    (GENERATE, {"sampling_params": 5}, "sampling_params", "expected `object | null`"),
    (GENERATE, {"sampling_params": {"top_p": "x"}}, "sampling_params.top_p", "expected `float | null`"),
    # Out of range
    (COMPLETIONS, {"temperature": 3}, "temperature", "at least 0 and at most 2; got 3"),
    (COMPLETIONS, {"top_p": 0}, "top_p", "above 0 and at most 1; got 0"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "at least 1"),
    (COMPLETIONS, {"n": 129}, "n", "at most 128; got 129"),
    (COMPLETIONS, {"seed": 10**30}, "seed", f"at most {2**63}; got {10**30}"),
    (COMPLETIONS, {"stop": ""}, "stop", "must not be empty"),
    (COMPLETIONS, {"stop": ["a"] * 17}, "stop", "at most 16 strings; got 17"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "must not be empty"),
    (COMPLETIONS, {"prompt": [10**30]}, "prompt", "not in the vocabulary"),
    (COMPLETIONS, {"prompt": ["a"] * 200}, "n", "200 generations; at most 128"),
    (COMPLETIONS, {"logit_bias": {"1": 101}}, "logit_bias", "at most 100; got 101"),
    (COMPLETIONS, {"logit_bias": {"1" * 5000: 1}}, "logit_bias", "is not a token id"),
    (CHAT, {"messages": []}, "messages", "must not be empty"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "one of system, developer"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs to be true"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ; give one"),
    (GENERATE, {"slo": -1}, "slo", "at least 0.001 and at most 86400; got -1"),
    (GENERATE, {"slo": 1e-323}, "slo", "at least 0.001"),
    (GENERATE, {"input_ids": [1]}, "text", "exactly one of text and input_ids"),
    (GENERATE, {"sampling_params": {"min_p": 2}}, "sampling_params.min_p", "at most 1; got 2"),
    # Not supported, or not known
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    (
        CHAT,
        {"messages": users([{"type": "image_url", "text": "a"}])},
        "messages[0].content[0].type",
        "only text",
    ),
    (COMPLETIONS, {"echo": True}, "echo", "is not supported"),
    (COMPLETIONS, {"best_of": 2}, "best_of", "is not supported"),
    (
        COMPLETIONS,
        {"stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "not",
    ),
    (
        COMPLETIONS,
        {"stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
        "needs stream_options.include_usage",
    ),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "only where stream is true"),
    (COMPLETIONS, {"stream": False, "stream_options": {}}, "stream_options", "only where stream is true"),
    (COMPLETIONS, {"colour": "red"}, "colour", "unknown parameter 'colour'"),
    (CHAT, {"messages": [{**users("a")[0], "colour": 1}]}, "messages[0].colour", "unknown parameter"),
    (
        GENERATE,
        {"sampling_params": {"json_schema": "{}"}},
        "sampling_params.json_schema",
        "unknown parameter",
    ),
]


@pytest.mark.parametrize(("path", "fields", "param", "told"), WRONG_FIELDS)
async def test_a_wrong_field_is_named(
    shared_stage: Stage, path: str, fields: dict[str, Any], param: str, told: str
) -> None:
    error = refusal(await shared_stage.http.post(path, json={**BASE[path], **fields}), 400)
    assert error["param"] == param
    assert told in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"model": "m", "prompt": "\\udc00 half of a pair"}', "not valid JSON"),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "not valid JSON"),
        (
            b'{"model": "m", "prompt": "x", "metadata": {"a": ' + b"[" * 9999 + b"]" * 9999 + b"}}",
            "too deeply",
        ),
        (b"null", "expected `object`, got `null`"),
        (b"[]", "expected `object`, got `array`"),
        (b"9" * 5000, "out of range"),
    ],
)
async def test_a_body_that_is_no_object_is_refused(shared_stage: Stage, body: bytes, told: str) -> None:
    error = refusal(await shared_stage.http.post(COMPLETIONS, content=body), 400)
    assert error["param"] is None
    assert told in error["message"]


@pytest.mark.parametrize("path", BASE)
async def test_a_missing_or_unknown_model_is_named(shared_stage: Stage, path: str) -> None:
    unknown = refusal(await shared_stage.http.post(path, json={**BASE[path], "model": "none"}), 404)
    assert (unknown["param"], unknown["code"]) == ("model", "model_not_found")
    assert "registered: m" in unknown["message"]
    if path != GENERATE:  # which takes the only model there is
        without = {key: value for key, value in BASE[path].items() if key != "model"}
        missing = refusal(await shared_stage.http.post(path, json=without), 400)
        assert missing["param"] == "model"


@pytest.mark.parametrize(
    ("path", "fields"),
    [(CHAT, {"messages": users(LONG)}), (COMPLETIONS, {"prompt": LONG}), (GENERATE, {"text": LONG})],
)
async def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(
    shared_stage: Stage, path: str, fields: dict[str, Any]
) -> None:
    error = refusal(await shared_stage.http.post(path, json={**BASE[path], **fields}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == next(iter(fields))
    assert f"context length is {CONTEXT_LENGTH} tokens" in error["message"]
    assert "the prompt has 50" in error["message"]


@pytest.mark.parametrize("fields", [{}, {"slo": 1}])
@pytest.mark.parametrize("objective", ["soon", "-1", "nan", "inf", "0", "1e-323", "0.999", "86400000.1"])
async def test_a_wrong_objective_is_named(
    shared_stage: Stage, fields: dict[str, Any], objective: str
) -> None:
    for header in ("X-SLO-TTFT-Ms", "X-SLO-TPOT-Ms"):
        response = await shared_stage.http.post(
            GENERATE, json={**BASE[GENERATE], **fields}, headers={header: objective}
        )
        error = refusal(response, 400)
        assert error["param"] == header
        assert "from 1 to 86400000 milliseconds" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/m", 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
    ],
)
async def test_what_is_not_there_is_said_in_the_same_shape(
    shared_stage: Stage, method: str, path: str, status: int, code: str
) -> None:
    response = await shared_stage.http.request(method, path)
    assert refusal(response, status)["code"] == code
    if status == 405:
        assert response.headers["allow"]


async def test_what_is_no_http_is_refused_in_the_same_shape(shared_stage: Stage) -> None:
    host, port = shared_stage.gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: many\r\n\r\n")
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status_line, *headers = head.decode().split("\r\n")
    response = httpx.Response(
        int(status_line.split()[1]), headers=dict(line.split(": ", 1) for line in headers), content=body
    )
    assert "not a valid HTTP/1.1 request" in refusal(response, 400)["message"]


SMALL_BUS = 128 * 1024


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [399] * 100_000},
        {"stop_token_ids": [399] * 100_000},
        {"logit_bias": {f"{id_:0{width}}": 1 / 3 for id_ in range(400) for width in range(8, 19)}},
    ],
)
async def test_what_is_too_large_for_the_bus_is_refused_before_it_waits(
    tmp_path: Path, bundle: TokenizerBundle, fields: dict[str, Any]
) -> None:
    with nats_server(tmp_path / "small", max_payload=SMALL_BUS) as server:
        async with (
            connect_bus(server.url, name="test") as bus,
            open_stage(bus, server, bundle, Settings()) as stage,
        ):
            await stage.register("m", context_length=10_000_000)
            error = refusal(await stage.http.post(COMPLETIONS, json={**BASE[COMPLETIONS], **fields}), 413)
            assert error["code"] == "payload_too_large"
            assert f"the bus takes {SMALL_BUS}" in error["message"]
