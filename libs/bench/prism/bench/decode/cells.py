"""The cells of the decode benchmark: each compares one model, or two together, in minutes."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from prism.bench.cell_commands import Cell
from prism.bench.decode.colocated import colocated_cell
from prism.bench.decode.comparing import Likeness, decode_rate, likeness
from prism.bench.decode.measured_systems import (
    ON_CPU,
    ON_GPU,
    TINY,
    Scale,
    model_folder,
    prompts_of,
    system_of,
)
from prism.bench.decode.moving_kv import MOVED_ON_CPU, MOVED_ON_GPU, moving_kv_cell
from prism.bench.decode.plain_engine import Batch, PlainSettings
from prism.bench.decode.sides import GatewaySide, Side, plain_side
from prism.bench.results import Row, row
from prism.cli.tiny_models import make_tiny_models
from prism.common.messages.placement import CommandKind

RATIO_TARGET = 0.97
CHECKED_PROMPTS = 16
CHECKED_TOKENS = 64
# What one of the checked prompts needs many times over.
LEAST_KV_TOKENS = 16_384
PAIR = ("1b", "8b")
MOVED = ("1b", "3b")
# Its step is a millisecond: fewer, and the times of the prefills before them would show in the difference.
LONG_TOKENS_1B = 1040
# It is all Python as well, which others on the host slow down.
REPEATS_1B = 9


async def rates(sides: Sequence[Side], scale: Scale) -> dict[int, list[float]]:
    """Tokens per second of decoding by number of streams, of each side.

    They take turns: a host that is slower for a while is so for all of them.
    """
    found = {}
    for streams in scale.streams:
        short: list[list[float]] = [[] for _ in sides]
        long: list[list[float]] = [[] for _ in sides]
        # The first round is for kernels that are loaded, or compiled, when first used.
        for seed in range(1 + scale.repeats):
            prompts = prompts_of(streams, scale.prompt_tokens, seed)
            for index, side in enumerate(sides):
                few = await side.generate(Batch(prompts, scale.short_tokens))
                many = await side.generate(Batch(prompts, scale.long_tokens))
                if seed:
                    short[index].append(few.seconds)
                    long[index].append(many.seconds)
        found[streams] = [
            decode_rate(streams, scale.short_tokens, scale.long_tokens, short[index], long[index])
            for index in range(len(sides))
        ]
    return found


def checked_batches(scale: Scale) -> list[Batch]:
    """What is asked for equality: one prompt at a time, so that batches have the same shape on both sides."""
    prompts = prompts_of(CHECKED_PROMPTS, scale.prompt_tokens, 1000)
    return [Batch([prompt], CHECKED_TOKENS, margins=True) for prompt in prompts]


async def decode_cell(size: str, scale: Scale, models: Path, log: Path) -> list[Row]:
    """One model under plain SGLang and under a worker, in turns.

    Rates are held against SGLang with its own defaults, but for a KV cache that leaves room for the other;
    answers against SGLang that computes prompts by the kernels that our engines use.
    """
    path = await asyncio.to_thread(model_folder, size, models)
    checked = checked_batches(scale)
    settings = PlainSettings(str(path), scale.device, scale.attention_backend, scale.plain_kv_tokens)
    async with contextlib.AsyncExitStack() as both:
        plain = await both.enter_async_context(plain_side(settings, log))
        # All start at once: starting is most of a cell's time.
        one_at_a_time = msgspec.structs.replace(settings, same_kernels=True, kv_tokens=LEAST_KV_TOKENS)
        async with plain_side(one_at_a_time, log) as alike:
            system = await both.enter_async_context(system_of({size: path}, scale, log, {}))
            await system.command(CommandKind.ACTIVATE, size)
            await alike.started()
            expected = [await alike.generate(batch) for batch in checked]
        await plain.started()
        side = GatewaySide(system.http, size)
        measured = await rates([plain, side], scale)
        said = [await side.generate(batch) for batch in checked]
        await system.command(CommandKind.DOZE, size)
        await system.command(CommandKind.ACTIVATE, size)
        said_again = [await side.generate(batch) for batch in checked]
    rows = []
    for streams in scale.streams:
        target = RATIO_TARGET if scale.device == "cuda" else None
        theirs, ours = measured[streams]
        note = f"{ours:,.0f} of {theirs:,.0f} tok/s; in turns, best of {scale.repeats}"
        ratio = round(ours / theirs, 4)
        figure = f"decode_ratio_{size}_{streams}"
        rows += [
            row(figure, ratio, "ratio", target=target, better="higher", note=note),
            row(f"decode_{size}_{streams}_tok_per_s", round(ours, 1), "tok/s"),
            row(f"decode_plain_{size}_{streams}_tok_per_s", round(theirs, 1), "tok/s"),
        ]
    like = likeness(
        [each.outputs[0] for each in said],
        [each.outputs[0] for each in expected],
        [each.margins[0] for each in expected],
        scale.near_tie,
    )
    differ = sum(one.outputs != other.outputs for one, other in zip(said, said_again, strict=True))
    return [*rows, *likeness_rows(size, like, scale.near_tie, differ)]


def likeness_rows(size: str, like: Likeness, near_tie: float, differ_after_wake: int) -> list[Row]:
    """Whether greedy answers are plain SGLang's, and the same after sleep."""
    note = (
        f"greedy answers that differ from those of plain SGLang without prefill graphs before a top-2 margin "
        f"under {near_tie}; "
        f"one request at a time, {like.compared_tokens} tokens compared, "
        f"{like.equal} of {like.answers} answers equal"
    )
    after = "the same prompts after a doze and a wake; exactly"
    return [
        row(f"decode_mismatches_{size}", like.mismatches, "count", target=0, better="equal", note=note),
        row(
            f"decode_woken_mismatches_{size}",
            differ_after_wake,
            "count",
            target=0,
            better="equal",
            note=after,
        ),
    ]


async def moving_kv(models: Path, log: Path) -> list[Row]:
    """A 1B and a 3B on a GPU."""
    paths = {size: await asyncio.to_thread(model_folder, size, models) for size in MOVED}
    return await moving_kv_cell(paths, ON_GPU, MOVED_ON_GPU, log, name="moving_kv")


async def moving_kv_tiny(models: Path, log: Path) -> list[Row]:
    """Two tiny models on a CPU."""
    folders = await asyncio.to_thread(make_tiny_models, models / TINY, report=print)
    paths = {folder.name: folder for folder in folders[:2]}
    return await moving_kv_cell(paths, ON_CPU, MOVED_ON_CPU, log, name="moving_kv_tiny")


def cells(models: Path, log: Path) -> dict[str, Cell]:
    """Every cell by name. Those of tiny models run on a CPU, to try the benchmark itself."""
    a_1b = replace(ON_GPU, long_tokens=LONG_TOKENS_1B, repeats=REPEATS_1B)
    named: dict[str, Cell] = {
        "decode_1b": partial(decode_cell, "1b", a_1b, models, log),
        "decode_8b": partial(decode_cell, "8b", ON_GPU, models, log),
    }
    named["colocated"] = partial(colocated_cell, PAIR, ON_GPU, models, log, False)
    named["colocated_mps"] = partial(colocated_cell, PAIR, ON_GPU, models, log, True)
    named["moving_kv"] = partial(moving_kv, models, log)
    named[f"moving_kv_{TINY}"] = partial(moving_kv_tiny, models, log)
    named[f"decode_{TINY}"] = partial(decode_cell, TINY, ON_CPU, models, log)
    return named
