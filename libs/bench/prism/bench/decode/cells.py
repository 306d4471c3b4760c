"""The cells of the decode benchmark: each compares one model, or two together, in minutes."""

import asyncio
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
REPEATS = 3
CHECKED_PROMPTS = 16
CHECKED_TOKENS = 64
PAIR = ("1b", "8b")
MOVED = ("1b", "3b")
# Its step is a millisecond: fewer, and the times of the prefills before them would show in the difference.
LONG_TOKENS_1B = 1552


async def rates(side: Side, scale: Scale) -> dict[int, float]:
    """Tokens per second of decoding, by number of streams."""
    found = {}
    for streams in scale.streams:
        times: dict[int, list[float]] = {scale.short_tokens: [], scale.long_tokens: []}
        # The first round is for kernels that are loaded, or compiled, when first used.
        for seed in range(1 + REPEATS):
            prompts = prompts_of(streams, scale.prompt_tokens, seed)
            for tokens, seconds in times.items():
                took = (await side.generate(Batch(prompts, tokens))).seconds
                if seed:
                    seconds.append(took)
        found[streams] = decode_rate(streams, scale.short_tokens, scale.long_tokens, *times.values())
    return found


def checked_batches(scale: Scale) -> list[Batch]:
    """What is asked for equality: one prompt at a time, so that batches have the same shape on both sides."""
    prompts = prompts_of(CHECKED_PROMPTS, scale.prompt_tokens, 1000)
    return [Batch([prompt], CHECKED_TOKENS, margins=True) for prompt in prompts]


async def decode_cell(size: str, scale: Scale, models: Path, log: Path) -> list[Row]:
    """One model under plain SGLang, then under a worker.

    Rates are held against SGLang with its own defaults; answers against SGLang that computes prompts by the
    kernels that our engines use.
    """
    path = await asyncio.to_thread(model_folder, size, models)
    checked = checked_batches(scale)
    settings = PlainSettings(str(path), scale.device, scale.attention_backend)
    async with plain_side(settings, log) as plain:
        theirs = await rates(plain, scale)
    async with plain_side(msgspec.structs.replace(settings, same_kernels=True), log) as plain:
        expected = [await plain.generate(batch) for batch in checked]
    async with system_of({size: path}, scale, log, {}) as system:
        await system.command(CommandKind.ACTIVATE, size)
        side = GatewaySide(system.http, size)
        ours = await rates(side, scale)
        said = [await side.generate(batch) for batch in checked]
        await system.command(CommandKind.DOZE, size)
        await system.command(CommandKind.ACTIVATE, size)
        said_again = [await side.generate(batch) for batch in checked]
    rows = []
    for streams in scale.streams:
        target = RATIO_TARGET if scale.device == "cuda" else None
        note = f"{ours[streams]:,.0f} of {theirs[streams]:,.0f} tok/s; medians of {REPEATS}"
        ratio = round(ours[streams] / theirs[streams], 4)
        figure = f"decode_ratio_{size}_{streams}"
        rows += [
            row(figure, ratio, "ratio", target=target, better="higher", note=note),
            row(f"decode_{size}_{streams}_tok_per_s", round(ours[streams], 1), "tok/s"),
            row(f"decode_plain_{size}_{streams}_tok_per_s", round(theirs[streams], 1), "tok/s"),
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
    named: dict[str, Cell] = {
        "decode_1b": partial(decode_cell, "1b", replace(ON_GPU, long_tokens=LONG_TOKENS_1B), models, log),
        "decode_8b": partial(decode_cell, "8b", ON_GPU, models, log),
    }
    named["colocated"] = partial(colocated_cell, PAIR, ON_GPU, models, log, False)
    named["colocated_mps"] = partial(colocated_cell, PAIR, ON_GPU, models, log, True)
    named["moving_kv"] = partial(moving_kv, models, log)
    named[f"moving_kv_{TINY}"] = partial(moving_kv_tiny, models, log)
    named[f"decode_{TINY}"] = partial(decode_cell, TINY, ON_CPU, models, log)
    return named
