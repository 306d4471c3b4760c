"""The openai Python client works against the gateway as it is."""

from collections.abc import AsyncIterator

import openai
import pytest

from prism.cli.system import RunningSystem

pytestmark = pytest.mark.engine

MODEL = "tiny-qwen3"


@pytest.fixture
async def openai_client(system: RunningSystem) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{system.gateway_url}/v1", api_key="unused") as client:
        yield client


async def test_models_are_listed(openai_client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in openai_client.models.list()]
    assert sorted(listed) == ["tiny-llama", "tiny-llama-big", "tiny-qwen3"]


async def test_chat_streaming_and_not_say_the_same(openai_client: openai.AsyncOpenAI) -> None:
    whole = await openai_client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=20, temperature=0
    )
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 20
    stream = await openai_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    # Cached tokens may differ: the second request finds the first one's prefix.
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_a_seed_repeats_and_another_differs(openai_client: openai.AsyncOpenAI) -> None:
    async def sampled(seed: int, n: int = 1) -> list[str]:
        answer = await openai_client.completions.create(
            model=MODEL, prompt="Once", max_tokens=12, temperature=1.0, seed=seed, n=n
        )
        return [choice.text for choice in answer.choices]

    assert await sampled(5) == await sampled(5)
    assert await sampled(5) != await sampled(6)
    several = await sampled(5, n=3)
    assert len(set(several)) == 3
    assert several[0] == (await sampled(5))[0]


async def test_logprobs_come_with_their_tokens(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for entry in content.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)


async def test_an_unknown_model_is_not_found(openai_client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        await openai_client.chat.completions.create(
            model="no-such-model", messages=[{"role": "user", "content": "Hello"}]
        )
