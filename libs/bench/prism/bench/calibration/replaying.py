"""A trace against the running system, in parts with something else between them."""

import asyncio
import random
import time
from collections.abc import Sequence
from itertools import groupby

import httpx

from prism.bench.calibration.probing import Timed, all_of, generate
from prism.bench.traces.trace import Trace, trace_of

# Longer than any answer takes: between two parts the simulated system is idle, as the real one is.
PAUSE_S = 10.0


def parts_of(trace: Trace, count: int, duration_s: float) -> list[Trace]:
    """Each of `count` equal parts of the time, from its own start; those that nobody asks in are left out."""
    part_s = duration_s / count
    indices = groupby(range(len(trace)), lambda index: min(count - 1, int(trace.arrival_s[index] / part_s)))
    return [
        trace_of(trace.models, [_row(trace, index, -part * part_s) for index in within], sort=False)
        for part, within in indices
    ]


def joined(parts: Sequence[Trace]) -> Trace:
    """One trace of them all, PAUSE_S without a request before each but the first."""
    rows, later_s = [], 0.0
    for part in parts:
        rows += [_row(part, index, later_s) for index in range(len(part))]
        later_s += part.duration_s + PAUSE_S
    return trace_of(parts[0].models, rows, sort=False)


def _row(trace: Trace, index: int, later_s: float) -> tuple[float, int, int, int]:
    return (
        trace.arrival_s[index] + later_s,
        trace.model[index],
        trace.prompt_tokens[index],
        trace.output_tokens[index],
    )


async def replay(client: httpx.AsyncClient, trace: Trace, seed: str) -> list[Timed]:
    """What its requests came to, each sent when it is due. Prompts are made from `seed`: those of another are
    in nobody's cache."""
    random_ = random.Random(seed)
    prompts = [random.Random(random_.random()) for _ in range(len(trace))]
    began = time.perf_counter()

    async def one(index: int) -> Timed:
        await asyncio.sleep(max(0.0, began + trace.arrival_s[index] - time.perf_counter()))
        model = trace.models[trace.model[index]]
        prompt, output = trace.prompt_tokens[index], trace.output_tokens[index]
        return await generate(client, model, prompt, output, prompts[index])

    return await all_of(one(index) for index in range(len(trace)))
