"""Two models that decode on one GPU at once, against each alone."""

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from prism.bench.decode.measured_systems import Scale, model_folder, prompts_of, system_of
from prism.bench.decode.mps import MpsUnavailable, mps_daemon
from prism.bench.decode.plain_engine import Batch
from prism.bench.decode.sides import GatewaySide, Side
from prism.bench.results import Row, row
from prism.common.messages.placement import CommandKind

STREAMS = 8


async def looped_rate(side: Side, streams: int, scale: Scale, seed: int) -> float:
    """Tokens per second of streams that ask again as soon as they are answered, for `scale.loop_s`."""
    began = time.perf_counter()

    async def stream(index: int) -> float:
        tokens = asked = 0
        while time.perf_counter() - began < scale.loop_s:
            prompts = prompts_of(1, scale.prompt_tokens, seed * 4096 + index * 512 + asked)
            answer = await side.generate(Batch(prompts, scale.long_tokens))
            tokens += len(answer.outputs[0])
            asked += 1
        return tokens / (time.perf_counter() - began)

    return sum(await asyncio.gather(*(stream(index) for index in range(streams))))


async def share_of_together(
    sizes: Sequence[str], scale: Scale, models: Path, log: Path, environment: dict[str, str]
) -> tuple[float, str]:
    """Two models' rates together over the sum of their rates alone, and the rates in words."""
    paths = {size: await asyncio.to_thread(model_folder, size, models) for size in sizes}
    async with system_of(paths, scale, log, environment) as system:
        sides = {size: GatewaySide(system.http, size) for size in sizes}
        for size, side in sides.items():
            await system.command(CommandKind.ACTIVATE, size)
            await looped_rate(side, 1, scale, 1)
        alone = {size: await looped_rate(side, STREAMS, scale, 2) for size, side in sides.items()}
        both = await asyncio.gather(*(looped_rate(side, STREAMS, scale, 3) for side in sides.values()))
    together = dict(zip(sides, both, strict=True))
    words = "; ".join(f"{size} {together[size]:,.0f} of {alone[size]:,.0f} tok/s" for size in sizes)
    return sum(together.values()) / sum(alone.values()), f"{words}; {STREAMS} streams each"


async def colocated_cell(sizes: Sequence[str], scale: Scale, models: Path, log: Path, mps: bool) -> list[Row]:
    """Two models that decode at once, with or without MPS."""
    figure = "colocated_throughput_share" + ("_mps" if mps else "")
    if not mps:
        share, words = await share_of_together(sizes, scale, models, log, {})
        return [row(figure, round(share, 4), "ratio", note=words)]
    with tempfile.TemporaryDirectory(prefix="prism-mps-") as folder:
        try:
            with mps_daemon(Path(folder) / "mps", dict(os.environ)) as environment:
                share, words = await share_of_together(sizes, scale, models, log, environment)
        except MpsUnavailable as error:
            return [row(figure, None, "ratio", note=f"MPS cannot be started here: {error}")]
    return [row(figure, round(share, 4), "ratio", note=words)]
