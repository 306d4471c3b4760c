"""LangChain's ChatOpenAI, unmodified."""

from pathlib import Path

import pytest
from tests.clients.conftest import MODEL, Count, Run
from tests.clients.library_script import check_answer, check_stream, streams_left, what_it_saw

from prism.cli.system import RunningSystem

pytestmark = pytest.mark.engine


async def test_chats_streams_chains_errors_and_a_stream_left_alone(
    run: Run, count: Count, system: RunningSystem, tmp_path: Path
) -> None:
    left_before = (await count()).requests("/v1/chat/completions", 499, MODEL)
    seen = await what_it_saw("with_langchain.py", run, system, tmp_path)

    check_answer(seen["invoke"])
    check_answer(seen["ainvoke"])
    check_stream(seen["stream"], seen["invoke"])
    check_answer(seen["next_turn"])
    assert seen["next_turn"]["usage"][0] > sum(seen["invoke"]["usage"][:2]), "it holds the first turn"
    assert seen["chain"] == seen["invoke"]["text"], "the same messages, made from a template"
    assert len(seen["batch"]) == 8
    for answer in seen["batch"]:
        check_answer(answer)

    assert "openai.NotFoundError" in seen["unknown_model"]
    assert seen["unknown_model"][0].endswith(".OpenAIModelNotFoundError")
    assert "openai.BadRequestError" in seen["impossible_temperature"]

    assert seen["left_after"]
    assert await streams_left(count, left_before) == 1
