"""Measuring a running system as its clients do: through the gateway, one request or many at once."""

import asyncio
import random
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import httpx
import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.common.tasks import end_task

# As far as the model's context goes, and one pass of prefill.
PROMPTS = (8, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8)
# Passes that a burst takes, and the most prompts in one.
BURST_PASSES, MOST_BURST = 6, 48
SHORT_PROMPT, LONG_PROMPT, BESIDE_PROMPT = 16, 256, 1024
OUTPUT, MOST_OUTPUT = 48, 384
DEADLINE_S = 120.0
# The end of an answer that is looked at, and told of one that broke off, in bytes.
TAIL_BYTES = 300
DONE = b"data: [DONE]"

T = TypeVar("T")


class Timed(msgspec.Struct, frozen=True):
    """One request as its client saw it, in seconds."""

    ttft_s: float
    total_s: float
    output_tokens: int

    @property
    def tpot_s(self) -> float:
        """Per token after the first."""
        return (self.total_s - self.ttft_s) / max(1, self.output_tokens - 1)


class Probe(msgspec.Struct, frozen=True):
    """What was measured of one model alone, whose engine prefills `pass_tokens` at once: first tokens by
    length of the prompt, none longer than that, a burst of prompts of `burst_tokens` by the time until all
    had their first token, and decode steps by sequences and KV tokens."""

    model: str
    pass_tokens: int
    first_token_s: dict[int, float]
    burst_tokens: int
    burst_s: dict[int, float]
    steps: list[tuple[int, float, float]]


class Beside(msgspec.Struct, frozen=True):
    """The first token of a prompt of one model, in seconds: alone, and while all others decode."""

    model: str
    prompt_tokens: int
    alone_s: float
    beside_s: float


async def generate(
    client: httpx.AsyncClient,
    model: str,
    prompt_tokens: int,
    output_tokens: int,
    random_: random.Random,
    decoding: asyncio.Event | None = None,
) -> Timed:
    """Stream one answer to a prompt that nobody has a prefix of. `decoding` is set once its first token is
    there, or none will come. Raises PrismError when there is none, or it breaks off."""
    body = {
        "model": model,
        "input_ids": [random_.randrange(10, 500) for _ in range(prompt_tokens)],
        "sampling_params": {"max_new_tokens": output_tokens, "ignore_eos": True, "temperature": 0},
        "stream": True,
    }
    began = time.perf_counter()
    first, tail = 0.0, b""
    try:
        async with client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                raise PrismError(ErrorCode.INTERNAL, f"{model}: status {response.status_code}: {said[:300]}")
            async for chunk in response.aiter_raw():
                first = first or time.perf_counter()
                tail = (tail + chunk)[-TAIL_BYTES:]
                if decoding is not None:
                    decoding.set()
    except httpx.HTTPError as error:
        raise PrismError(ErrorCode.INTERNAL, f"{model}: the gateway did not answer: {error!r}") from error
    finally:
        if decoding is not None:
            decoding.set()
    total_s = time.perf_counter() - began
    if not tail.rstrip().endswith(DONE):
        said = tail.decode(errors="replace")
        raise PrismError(ErrorCode.INTERNAL, f"{model}: the answer broke off, after: {said!r}")
    return Timed(first - began, total_s, output_tokens)


async def all_of(awaited: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they come to, at the same time. Where one fails the others are ended, and its error is raised."""
    tasks = [asyncio.create_task(each) for each in awaited]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await asyncio.gather(*(end_task(task) for task in tasks))


async def probe_once(
    client: httpx.AsyncClient, model: str, context_length: int, pass_tokens: int, random_: random.Random
) -> Probe:
    """Measure a model that nobody else uses, each figure once: the machine may be a slower one for seconds,
    and what is measured again in the next round is most likely measured outside of them.

    No prompt takes two passes: each pass has a cost of its own, which would look like one of tokens.
    """
    await generate(client, model, SHORT_PROMPT, 4, random_)
    lengths = [length for length in PROMPTS if length + 1 < context_length and length <= pass_tokens]
    first_token_s = {length: (await generate(client, model, length, 1, random_)).ttft_s for length in lengths}
    longest = lengths[-1]
    burst_s = {}
    for count in (1, min(BURST_PASSES * pass_tokens // longest, MOST_BURST)):
        times = await _together([(model, longest, 1)] * count, client, random_)
        burst_s[count] = max(each.ttft_s for each in times)
    steps = []
    for prompt in (SHORT_PROMPT, min(LONG_PROMPT, context_length // 2)):
        for batch in BATCHES:
            times = await _together([(model, prompt, OUTPUT)] * batch, client, random_)
            # Of the sequence that was prefilled last: the others' steps wait for the prefills of some.
            steps.append((batch, batch * (prompt + OUTPUT / 2), min(each.tpot_s for each in times)))
    return Probe(model, pass_tokens, first_token_s, longest, burst_s, steps)


async def slowdown_once(
    client: httpx.AsyncClient, context_lengths: Mapping[str, int], random_: random.Random
) -> list[float]:
    """How many times longer a step of each takes when all models decode at once, each for about as long as
    the slowest of them. Their contexts are `context_lengths`."""
    alone = [
        (await generate(client, model, SHORT_PROMPT, OUTPUT, random_)).tpot_s for model in context_lengths
    ]
    together = await _together(
        [
            (model, SHORT_PROMPT, min(round(OUTPUT * max(alone) / one), MOST_OUTPUT, context // 2))
            for (model, context), one in zip(context_lengths.items(), alone, strict=True)
        ],
        client,
        random_,
    )
    return [both.tpot_s / one for one, both in zip(alone, together, strict=True)]


async def beside_once(
    client: httpx.AsyncClient, context_lengths: Mapping[str, int], pass_tokens: int, random_: random.Random
) -> list[Beside]:
    """Of each of the models, whose contexts are `context_lengths`, a prompt that one pass takes."""
    found = []
    for model, context_length in context_lengths.items():
        prompt = min(BESIDE_PROMPT, context_length // 2, pass_tokens)
        others = [other for other in context_lengths if other != model]
        alone_s = (await generate(client, model, prompt, 1, random_)).ttft_s
        beside_s = await _first_token_beside(client, model, prompt, others, random_)
        found.append(Beside(model, prompt, alone_s, beside_s))
    return found


async def _first_token_beside(
    client: httpx.AsyncClient, model: str, prompt: int, others: Sequence[str], random_: random.Random
) -> float:
    decoding = [asyncio.Event() for _ in others]

    async def asked() -> Timed:
        for each in decoding:
            await each.wait()
        return await generate(client, model, prompt, 1, random_)

    # Twice the output that steps are measured by: it should outlast the prefill.
    decodes = (
        generate(client, other, SHORT_PROMPT, 2 * OUTPUT, random_, each)
        for other, each in zip(others, decoding, strict=True)
    )
    seen, *_ = await all_of([asked(), *decodes])
    return seen.ttft_s


async def _together(
    requests: Sequence[tuple[str, int, int]], client: httpx.AsyncClient, random_: random.Random
) -> list[Timed]:
    return await all_of(
        generate(client, model, prompt, output, random_) for model, prompt, output in requests
    )


async def served_models(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    """What the gateway tells of each model that it serves, by name. Raises PrismError when it can't be
    asked."""
    try:
        answer = (await client.get("/v1/models")).raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise PrismError(
            ErrorCode.INTERNAL, f"{client.base_url} does not list its models: {error}"
        ) from error
    return {entry["id"]: entry for entry in answer["data"]}
