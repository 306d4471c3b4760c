"""A client that goes away takes its request along, wherever it is by then: the engine's counters show it."""

import asyncio
import json
import statistics
import time
from itertools import pairwise

import httpx
import pytest
from tests.end_to_end.observing import Watcher, generate, put_to_sleep

from prism.common.messages.load import ModelLoad
from prism.common.messages.models import ModelState

pytestmark = pytest.mark.engine

MODEL = "tiny-llama"
LONG = 1500
TRIALS = 5
PROMISED_S = 0.1
MORE_THAN_RUN = 20


def load_of(watcher: Watcher) -> ModelLoad:
    return next(load for load in watcher.reports[-1].models if load.model == MODEL)


def body(prompt: list[int]) -> dict[str, object]:
    return {
        "model": MODEL,
        "input_ids": prompt,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True},
    }


async def until_quiet(watcher: Watcher) -> ModelLoad:
    """Wait for a report of an engine that has nothing to do any more."""
    seen = len(watcher.reports)
    await watcher.until(
        lambda: len(watcher.reports) > seen and load_of(watcher).running == load_of(watcher).queued == 0
    )
    return load_of(watcher)


async def leave_after(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> tuple[int, float]:
    """Go away after `tokens` tokens. How many there were by then, and the seconds between two of them."""
    times: list[float] = []
    async with client.stream("POST", "/generate", json=body(prompt)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
                received = len(json.loads(line.removeprefix("data: "))["output_ids"])
                if received >= tokens:
                    return received, statistics.median(b - a for a, b in pairwise(times))
    raise AssertionError("the stream ended by itself")


async def test_a_running_request_ends_within_the_time_promised(
    client: httpx.AsyncClient, watcher: Watcher
) -> None:
    await generate(client, MODEL, [5, 6, 7], 2)
    before = (await until_quiet(watcher)).generated_tokens
    overrun_s = []
    for trial in range(TRIALS):
        received, pace_s = await leave_after(client, [5, 6, trial + 8], 20)
        after = (await until_quiet(watcher)).generated_tokens
        # Counted in tokens made for nobody, so that a slow machine slows both sides of the comparison.
        overrun_s.append((after - before - received) * pace_s)
        before = after
    print("seconds that a cancelled request ran on:", [f"{value:.3f}" for value in overrun_s])
    assert statistics.median(overrun_s) <= PROMISED_S


async def test_a_queued_request_never_reaches_the_engine(client: httpx.AsyncClient, watcher: Watcher) -> None:
    await generate(client, MODEL, [5, 6, 7], 2)
    await until_quiet(watcher)
    running = [asyncio.create_task(leave_after(client, [9, index], LONG)) for index in range(MORE_THAN_RUN)]
    try:
        await watcher.until(lambda: load_of(watcher).running + load_of(watcher).queued == MORE_THAN_RUN)
        waiting = load_of(watcher).queued
        assert waiting > 0
        last = asyncio.create_task(leave_after(client, [10, 11], 1))
        await watcher.until(lambda: load_of(watcher).queued == waiting + 1)
        last.cancel()
        await watcher.until(lambda: load_of(watcher).queued == waiting)
        assert load_of(watcher).running == MORE_THAN_RUN - waiting
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    await until_quiet(watcher)


async def test_a_parked_request_is_not_sent_when_its_model_wakes(
    client: httpx.AsyncClient, watcher: Watcher
) -> None:
    await generate(client, MODEL, [5, 6, 7], 2)
    await put_to_sleep(client, watcher, MODEL, ["tiny-llama-big", "tiny-qwen3"])
    before = load_of(watcher).generated_tokens
    parked = asyncio.create_task(leave_after(client, [5, 6, 9], LONG))
    await watcher.until(lambda: load_of(watcher).state is not ModelState.DOZING)
    parked.cancel()
    await asyncio.gather(parked, return_exceptions=True)
    load = await until_quiet(watcher)
    # At most what came out between the wake and the cancellation that raced with it.
    assert load.generated_tokens - before <= PROMISED_S / 0.002
