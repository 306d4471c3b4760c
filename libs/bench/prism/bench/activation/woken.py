"""What the cells share: a system to command, one wake with all its times, what the driver counts."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prism.bench.activation.commanded_system import CommandedSystem, commanded_system
from prism.bench.activation.random_models import SHAPES, write_random_model
from prism.common.messages.placement import CommandKind

MIB = 1 << 20
PROMPT_TOKENS = 128
ANSWER_TOKENS = 16
KV_GB = 2.0
SETTLE_S = 0.5


@dataclass(frozen=True)
class Woken:
    """One wake, in seconds: from the command to the first byte of an answer, of the copy by the GPU's clock
    (rank 0's), of the command, from its begin to the request on the bus (which may come before the last
    weights do), from there to its first token on the bus; what was said, and the phases that the worker
    tells of."""

    first_token_s: float
    copy_s: float
    command_s: float
    until_request_s: float
    to_token_frame_s: float
    text: str
    phases: dict[str, float]


@asynccontextmanager
async def system_of(
    sizes: Sequence[str],
    models: Path,
    log: Path,
    *,
    image_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    tp_size: int = 1,
    workers: int = 1,
) -> AsyncIterator[CommandedSystem]:
    """A system with random models of these sizes, each on `tp_size` GPUs, none of them started, and so many
    workers; images outlive it in `image_dir`."""
    paths = {}
    for seed, size in enumerate(sizes):
        paths[size] = models / size
        await asyncio.to_thread(write_random_model, paths[size], SHAPES[size], seed + 1)
    with tempfile.TemporaryDirectory(prefix="prism-bench-") as scratch:
        async with commanded_system(
            paths,
            Path(scratch),
            kv_gb=KV_GB,
            log=log,
            image_dir=image_dir,
            environment=environment,
            tp_size=tp_size,
            workers=workers,
        ) as system:
            yield system


def prompt_of(seed: int) -> list[int]:
    """PROMPT_TOKENS token ids that no other seed has as a prefix."""
    return [6 + (seed * 7919 + position * 104729) % 900 for position in range(PROMPT_TOKENS)]


async def wake(system: CommandedSystem, model: str, prompt: list[int]) -> Woken:
    """Ask a dozing model for something, then have it woken."""
    asked = asyncio.create_task(system.complete(model, prompt, ANSWER_TOKENS), name="asked")
    await system.parked(1)
    began = time.monotonic()
    outcome = await system.command(CommandKind.ACTIVATE, model)
    told = time.monotonic()
    answer = await asked
    if answer.error:
        raise RuntimeError(f"{model} answered with an error: {answer.error}")
    copy_s = outcome.seconds.get("copy", 0.0)
    # The first frame says that the request was taken.
    token_at = system.framed_at[1] if len(system.framed_at) > 1 else answer.first_byte_at
    return Woken(
        first_token_s=answer.first_byte_at - began,
        copy_s=copy_s,
        command_s=told - began,
        until_request_s=system.requested_at - began,
        to_token_frame_s=token_at - system.requested_at,
        text=answer.text,
        phases=outcome.seconds,
    )


def median(values: Iterable[float]) -> float:
    """To a tenth of a millisecond."""
    return round(statistics.median(values), 4)
