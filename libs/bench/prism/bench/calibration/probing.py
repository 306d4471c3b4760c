"""Measuring a running system as its clients do: through the gateway, one request or many at once."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import httpx
import msgspec

from prism.common.errors import ErrorCode, PrismError

REPEATS = 5
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


async def probe(
    client: httpx.AsyncClient,
    model: str,
    context_length: int,
    pass_tokens: int,
    *,
    tell: Callable[[str], None] = lambda line: None,
    seed: int = 0,
) -> Probe:
    """Measure a model that nobody else uses. Medians of REPEATS. `tell` hears what is under way.

    No prompt takes two passes: each pass has a cost of its own, which would look like one of tokens.
    """
    tell(f"{model}: waking")
    random_ = random.Random(f"{model}/{seed}")
    await generate(client, model, SHORT_PROMPT, 4, random_)
    lengths = [length for length in PROMPTS if length + 1 < context_length and length <= pass_tokens]
    tell(f"{model}: first tokens")
    first_token_s = {}
    for length in lengths:
        seen = [(await generate(client, model, length, 1, random_)).ttft_s for _ in range(REPEATS)]
        first_token_s[length] = median(seen)
    tell(f"{model}: bursts")
    longest = lengths[-1]
    bursts: dict[int, list[float]] = {1: [], min(BURST_PASSES * pass_tokens // longest, MOST_BURST): []}
    for _ in range(REPEATS):
        for count, seen in bursts.items():
            times = await _together([(model, longest, 1)] * count, client, random_)
            seen.append(max(each.ttft_s for each in times))
    tell(f"{model}: steps")
    steps = []
    for prompt in (SHORT_PROMPT, min(LONG_PROMPT, context_length // 2)):
        for batch in BATCHES:
            tpots = []
            for _ in range(max(1, REPEATS // 2)):
                times = await _together([(model, prompt, OUTPUT)] * batch, client, random_)
                tpots.append(median(each.tpot_s for each in times))
            steps.append((batch, batch * (prompt + OUTPUT / 2), median(tpots)))
    burst_s = {count: median(seen) for count, seen in bursts.items()}
    return Probe(model, pass_tokens, first_token_s, longest, burst_s, steps)


async def slowdown(client: httpx.AsyncClient, models: Sequence[str], seed: int = 0) -> float:
    """How many times longer steps take when all `models` decode at once."""
    random_ = random.Random(f"slowdown/{seed}")
    ratios = []
    for _ in range(REPEATS):
        alone = [(await generate(client, model, SHORT_PROMPT, OUTPUT, random_)).tpot_s for model in models]
        together = await _together([(model, SHORT_PROMPT, OUTPUT) for model in models], client, random_)
        ratios += [both.tpot_s / one for one, both in zip(alone, together, strict=True)]
    return median(ratios)


async def first_tokens_beside(
    client: httpx.AsyncClient, context_lengths: Mapping[str, int], seed: int = 0
) -> list[Beside]:
    """Of each of the models, whose contexts are `context_lengths`. Medians of REPEATS, alone and beside the
    others by turns, so that both see the machine in the same state."""
    random_ = random.Random(f"beside/{seed}")
    found = []
    for model, context_length in context_lengths.items():
        prompt = min(BESIDE_PROMPT, context_length // 2)
        others = [other for other in context_lengths if other != model]
        alone, beside = [], []
        for _ in range(REPEATS):
            alone.append((await generate(client, model, prompt, 1, random_)).ttft_s)
            beside.append(await _first_token_beside(client, model, prompt, others, random_))
        found.append(Beside(model, prompt, median(alone), median(beside)))
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


async def context_lengths(client: httpx.AsyncClient) -> dict[str, int]:
    """Of all models that the gateway serves. Raises PrismError when it can't be asked."""
    try:
        answer = (await client.get("/v1/models")).raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise PrismError(
            ErrorCode.INTERNAL, f"{client.base_url} does not list its models: {error}"
        ) from error
    return {entry["id"]: entry.get("context_length") or 2048 for entry in answer["data"]}
