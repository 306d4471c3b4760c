"""LiteLLM's client, unmodified: its `openai` and `text-completion-openai` providers."""

from pathlib import Path

import pytest
from tests.clients.conftest import MODEL, Count, Run
from tests.clients.library_script import check_answer, check_stream, streams_left, what_it_saw

from prism.cli.system import RunningSystem

pytestmark = pytest.mark.engine


async def test_chats_texts_streams_errors_and_a_stream_left_alone(
    run: Run, count: Count, system: RunningSystem, tmp_path: Path
) -> None:
    left_before = (await count()).requests("/v1/chat/completions", 499, MODEL)
    seen = await what_it_saw("with_litellm.py", run, system, tmp_path)

    check_answer(seen["chat"])
    check_stream(seen["chat_stream"], seen["chat"])
    check_answer(seen["text"])
    check_stream(seen["text_stream"], seen["text"])
    assert len(seen["together"]) == 8
    for answer in seen["together"]:
        check_answer(answer)

    assert seen["unknown_model"][0] == "litellm.exceptions.NotFoundError"
    assert seen["impossible_temperature"][0] == "litellm.exceptions.BadRequestError"

    assert seen["left_after"]
    assert await streams_left(count, left_before) == 1
