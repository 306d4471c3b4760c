"""How fast a model comes from host memory through a warm shell, and from nothing at all."""

import asyncio
import tempfile
import time
from pathlib import Path

from prism.bench.activation.commanded_system import CommandedSystem
from prism.bench.activation.raw_rates import drop_cached
from prism.bench.activation.woken import ANSWER_TOKENS, median, prompt_of, system_of, wake
from prism.bench.results import Row, row
from prism.common.messages.placement import CommandKind

STARTS = 3
STAGED_TARGET_S = 1.5
DECODED_TOKENS = 64
GRAPHS_BEHIND_S = 8.0


async def staged_cell(size: str, models: Path, log: Path, *, deferred: bool) -> list[Row]:
    """From an image in host memory to the first token through a warm shell, again and again.

    With `deferred`, CUDA graphs are captured once the engine has been idle for a while, else beforehand.
    """
    name = f"staged_{size}" if deferred else f"staged_{size}_with_graphs"
    environment = {"PRISM_DEFER_GRAPHS": "1" if deferred else "0"}
    starts = []
    async with system_of([size], models, log, environment=environment) as system:
        await system.command(CommandKind.ACTIVATE, size)
        said = (await system.complete(size, prompt_of(1), ANSWER_TOKENS)).text
        await system.doze_once_imaged(size)
        for _ in range(STARTS):
            await system.command(CommandKind.RELEASE, size)
            await system.shell_is_warm()
            starts.append(await wake(system, size, prompt_of(1)))
        at_once = await _decode_rate(system, size, 2)
        await asyncio.sleep(GRAPHS_BEHIND_S)
        later = await _decode_rate(system, size, 3)
    first = median(each.first_token_s for each in starts)
    mismatches = sum(each.text != said for each in starts)
    phases = {key: median(each.phases.get(key, 0.0) for each in starts) for key in starts[0].phases}
    return [
        row(
            f"{name}_first_token_s",
            first,
            "s",
            # With graphs it takes as long as they are many.
            target=STAGED_TARGET_S if deferred else None,
            note=f"median of {STARTS}",
        ),
        *(row(f"{name}_{phase}_s", seconds, "s") for phase, seconds in sorted(phases.items())),
        row(f"{name}_decode_tok_per_s", round(at_once, 1), "tok/s", note="one stream, right after"),
        row(f"{name}_decode_later_tok_per_s", round(later, 1), "tok/s", note=f"{GRAPHS_BEHIND_S:g} s later"),
        row(f"{name}_mismatches", mismatches, "count", target=0, better="equal", note="of the first build's"),
    ]


async def _decode_rate(system: CommandedSystem, size: str, seed: int) -> float:
    began = time.monotonic()
    await system.complete(size, prompt_of(seed), DECODED_TOKENS)
    return DECODED_TOKENS / (time.monotonic() - began)


async def cold_start_cell(size: str, models: Path, log: Path) -> list[Row]:
    """From no process at all to the first token: once without, once with an image on disk."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="prism-bench-images-") as images:
        for name in ("cold_start", "cold_start_imaged"):
            rows += await _cold_start(name, size, models, log.with_name(f"{name}.log"), Path(images))
    return rows


def _forget(model: Path, images: Path) -> None:
    drop_cached([*model.glob("*.safetensors"), *(path for path in images.rglob("*") if path.is_file())])


async def _cold_start(name: str, size: str, models: Path, log: Path, images: Path) -> list[Row]:
    await asyncio.to_thread(_forget, models / size, images)
    began = time.monotonic()
    async with system_of([size], models, log, image_dir=images) as system:
        up_s = time.monotonic() - began
        woken = await wake(system, size, prompt_of(1))
        # The image has to be on disk before the next start.
        await system.command(CommandKind.DOZE, size)
    note = f"{size.upper()}: services and a warm shell, then from the command on; files not in the page cache"
    return [
        row(f"{name}_s", round(up_s + woken.first_token_s, 2), "s", note=note),
        row(f"{name}_up_s", round(up_s, 2), "s", note="imports and a CUDA context included"),
        *(row(f"{name}_{phase}_s", round(s, 3), "s") for phase, s in sorted(woken.phases.items())),
        row(f"{name}_first_token_s", round(woken.first_token_s, 3), "s", note="from the command"),
    ]
