"""The openai client, unmodified."""

from collections.abc import AsyncIterator

import openai
import pytest
from tests.gateway.conftest import Stage
from tests.gateway.scripted_worker import Turn, saying

pytestmark = pytest.mark.core


@pytest.fixture
async def client(stage: Stage) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of the gateway."""
    async with openai.AsyncOpenAI(
        base_url=f"{stage.gateway.url}/v1", api_key="unused", max_retries=0
    ) as connected:
        yield connected


async def test_chat(stage: Stage, client: openai.AsyncOpenAI) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("good "), stage.ids("morning 🙂")), "m")
    answer = await client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=20, temperature=0
    )
    assert answer.choices[0].message.content == "good morning 🙂"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = await client.chat.completions.create(
        model="m",
        messages=[answer.choices[0].message.model_dump(), {"role": "user", "content": "and?"}],  # type: ignore[list-item]
    )
    assert again.choices[0].message.role == "assistant"


async def test_chat_stream(stage: Stage, client: openai.AsyncOpenAI) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("good "), stage.ids("morning 🙂")), "m")
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "good morning 🙂"
    assert chunks[-1].usage is not None


async def test_completions_and_their_stream(stage: Stage, client: openai.AsyncOpenAI) -> None:
    await stage.register("m")
    await stage.worker(saying(stage.ids("one "), stage.ids("two")), "m")
    answer = await client.completions.create(model="m", prompt=["a", "b"], stop=["zzz"])
    assert [choice.text for choice in answer.choices] == ["one two", "one two"]
    stream = await client.completions.create(model="m", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "one two"


async def test_models(stage: Stage, client: openai.AsyncOpenAI) -> None:
    await stage.register("org/m")
    assert [model.id async for model in client.models.list()] == ["org/m"]
    assert (await client.models.retrieve("org/m")).id == "org/m"


async def test_errors_are_those_of_the_client(stage: Stage, client: openai.AsyncOpenAI) -> None:
    await stage.register("m")
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="none", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.completions.create(model="m", prompt="a", temperature=9)
    assert wrong.value.param == "temperature"


async def test_error_in_mid_stream_is_raised(stage: Stage, client: openai.AsyncOpenAI) -> None:
    await stage.register("m")

    async def script(turn: Turn) -> None:
        if not turn.request.replayed_tokens:
            await turn.send(stage.ids("one "))
        await turn.send(finish="abort")

    worker = await stage.worker(script, "m")
    stream = await client.completions.create(model="m", prompt="a", stream=True, max_tokens=90)
    assert (await anext(stream)).choices[0].text == "one "
    with pytest.raises(openai.APIError, match="abort"):
        _ = [chunk async for chunk in stream]
    assert worker.turns.qsize() == 4
