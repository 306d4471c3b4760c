"""Measuring a running system as its clients do: through the gateway, one request or many at once."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import httpx
import msgspec

from prism.common.errors import ErrorCode, PrismError

# As far as the model's context goes, and one pass of prefill.
PROMPTS = (8, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8)
# Passes that a burst takes, and the most prompts in one.
BURST_PASSES, MOST_BURST = 6, 48
SHORT_PROMPT, LONG_PROMPT, BESIDE_PROMPT = 16, 256, 1024
OUTPUT = 48
DEADLINE_S = 120.0


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
    there, or none will come. Raises PrismError when there is none."""
    body = {
        "model": model,
        "input_ids": [random_.randrange(10, 500) for _ in range(prompt_tokens)],
        "sampling_params": {"max_new_tokens": output_tokens, "ignore_eos": True, "temperature": 0},
        "stream": True,
    }
    began = time.perf_counter()
    first = 0.0
    try:
        async with client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                raise PrismError(ErrorCode.INTERNAL, f"{model}: status {response.status_code}: {said[:300]}")
            async for _ in response.aiter_raw():
                first = first or time.perf_counter()
                if decoding is not None:
                    decoding.set()
    except httpx.HTTPError as error:
        raise PrismError(ErrorCode.INTERNAL, f"{model}: the gateway did not answer: {error!r}") from error
    finally:
        if decoding is not None:
            decoding.set()
    return Timed(first - began, time.perf_counter() - began, output_tokens)


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
            steps.append((batch, batch * (prompt + OUTPUT / 2), median(each.tpot_s for each in times)))
    return Probe(model, pass_tokens, first_token_s, longest, burst_s, steps)


async def slowdown_once(
    client: httpx.AsyncClient, models: Sequence[str], random_: random.Random
) -> list[float]:
    """How many times longer a step of each takes when all `models` decode at once."""
    alone = [(await generate(client, model, SHORT_PROMPT, OUTPUT, random_)).tpot_s for model in models]
    together = await _together([(model, SHORT_PROMPT, OUTPUT) for model in models], client, random_)
    return [both.tpot_s / one for one, both in zip(alone, together, strict=True)]


async def beside_once(
    client: httpx.AsyncClient, context_lengths: Mapping[str, int], random_: random.Random
) -> list[Beside]:
    """Of each of the models, whose contexts are `context_lengths`."""
    found = []
    for model, context_length in context_lengths.items():
        prompt = min(BESIDE_PROMPT, context_length // 2)
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
    seen, *_ = await asyncio.gather(asked(), *decodes)
    return seen.ttft_s


async def _together(
    requests: Sequence[tuple[str, int, int]], client: httpx.AsyncClient, random_: random.Random
) -> list[Timed]:
    return list(
        await asyncio.gather(
            *(generate(client, model, prompt, output, random_) for model, prompt, output in requests)
        )
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
