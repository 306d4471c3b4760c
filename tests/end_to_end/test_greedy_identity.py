"""Greedy tokens through HTTP are those of `transformers.generate` on the same folder."""

import asyncio
import json
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.end_to_end.observing import Watcher, generate, put_to_sleep

from prism.cli.tiny_check import check_prompts
from prism.common.messages.models import ModelState

pytestmark = pytest.mark.engine

NAMES = ["tiny-llama", "tiny-qwen3", "tiny-llama-big"]
TOKENS = 32


class Reference:
    """What transformers says of one model: prompts as text and ids, and their greedy continuations."""

    def __init__(self, folder: Path) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.texts = check_prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.prompts: list[list[int]] = [
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts
        ]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.outputs: list[list[int]] = []
        for prompt in self.prompts:
            with torch.inference_mode():
                output = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    do_sample=False,
                    max_new_tokens=TOKENS,
                )
            self.outputs.append(output[0, len(prompt) :].tolist())

    def text(self, index: int) -> str:
        """The continuation of prompt `index` as text."""
        decoded: str = self.tokenizer.decode(self.outputs[index], skip_special_tokens=True)
        return decoded


@cache
def _reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="session")
def references(tiny_models: dict[str, Path]) -> dict[str, Reference]:
    return {name: _reference(folder) for name, folder in tiny_models.items()}


async def completion(client: httpx.AsyncClient, model: str, prompt: str | list[int], *, stream: bool) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    if not stream:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text
    parts: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        parts += [choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
    return "".join(parts)


def test_the_prompts_are_many_and_of_all_lengths(references: dict[str, Reference]) -> None:
    lengths = sorted(len(prompt) for prompt in references["tiny-llama"].prompts)
    assert len(lengths) >= 10
    assert lengths[0] == 1
    assert 600 <= lengths[-1] <= 700


@pytest.mark.parametrize("name", NAMES)
async def test_alone_as_token_ids(
    client: httpx.AsyncClient, references: dict[str, Reference], name: str
) -> None:
    reference = references[name]
    for prompt, expected in zip(reference.prompts, reference.outputs, strict=True):
        assert await generate(client, name, prompt, TOKENS) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stream", [False, True])
async def test_alone_as_text(
    client: httpx.AsyncClient, references: dict[str, Reference], name: str, stream: bool
) -> None:
    reference = references[name]
    for index, prompt in enumerate(reference.prompts):
        assert await completion(client, name, prompt, stream=stream) == reference.text(index)


@pytest.mark.parametrize("stream", [False, True])
async def test_eight_at_once_across_all_three_models(
    client: httpx.AsyncClient, references: dict[str, Reference], stream: bool
) -> None:
    limit = asyncio.Semaphore(8)

    async def one(name: str, index: int) -> None:
        async with limit:
            got = await completion(client, name, references[name].prompts[index], stream=stream)
        assert got == references[name].text(index), (name, index)

    count = len(references["tiny-llama"].prompts)
    await asyncio.gather(*(one(name, index) for index in range(count) for name in NAMES))


@pytest.mark.parametrize("name", NAMES)
async def test_after_sleep_and_wake(
    client: httpx.AsyncClient, references: dict[str, Reference], watcher: Watcher, name: str
) -> None:
    reference = references[name]
    await generate(client, name, reference.prompts[0], 1)
    for stream in (None, False, True):
        await put_to_sleep(client, watcher, name, [other for other in NAMES if other != name])
        assert watcher.state(name) is ModelState.DOZING
        woken = watcher.count("waking", name)
        for index, prompt in enumerate(reference.prompts):
            if stream is None:
                assert await generate(client, name, prompt, TOKENS) == reference.outputs[index]
            else:
                assert await completion(client, name, prompt, stream=stream) == reference.text(index)
        assert watcher.count("waking", name) == woken + 1


async def test_chat_is_the_chat_template_and_the_same_tokens(
    client: httpx.AsyncClient, references: dict[str, Reference]
) -> None:
    from prism.cli.tiny_check import check_conversations

    for name in NAMES:
        reference = references[name]
        for messages in check_conversations():
            rendered = reference.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            index = reference.texts.index(rendered)
            response = await client.post(
                "/v1/chat/completions",
                json={"model": name, "messages": messages, "max_tokens": TOKENS, "temperature": 0},
            )
            assert response.status_code == 200, response.text
            choice = response.json()["choices"][0]
            assert choice["message"]["content"] == reference.text(index)
            assert response.json()["usage"]["prompt_tokens"] == len(reference.prompts[index])
