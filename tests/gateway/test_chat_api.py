"""POST /v1/chat/completions over HTTP."""

import json
from typing import Any

import httpx
import pytest

from prism.common.messages.generation import TokenLogprob
from tests.gateway.conftest import CONTEXT_LENGTH, Stage
from tests.gateway.scripted_worker import Turn, saying

pytestmark = pytest.mark.core

HELLO = [{"role": "user", "content": "hello"}]


def read_events(text: str) -> list[Any]:
    """The events of a stream, without [DONE], which must come last."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


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
