"""What is measured: how much of it, on which device, and the system that is asked."""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prism.bench.activation.commanded_system import CommandedSystem, commanded_system
from prism.bench.activation.random_models import SHAPES, write_random_model
from prism.cli.tiny_models import make_tiny_models

TINY = "tiny"
# A logit of 16 to 32 in bfloat16 is a multiple of 0.125; each of two may be rounded the other way.
BFLOAT16_NEAR_TIE = 0.25
FLOAT32_NEAR_TIE = 0.001


@dataclass(frozen=True)
class Scale:
    """How much is measured, and where. Memory in 10^9 bytes; `plain_kv_tokens` fit into the KV cache of plain
    SGLang; `near_tie` is a distance of log-probabilities
    that the rounding of other kernels can turn round."""

    device: str
    attention_backend: str
    streams: tuple[int, ...]
    prompt_tokens: int
    short_tokens: int
    long_tokens: int
    kv_gb: float
    plain_kv_tokens: int
    store_memory_gb: float
    worker_memory_gb: float | None
    repeats: int
    loop_s: float
    near_tie: float


ON_GPU = Scale(
    device="cuda",
    attention_backend=os.environ.get("PRISM_ATTENTION_BACKEND", "triton"),
    streams=(1, 8, 64),
    prompt_tokens=128,
    short_tokens=16,
    long_tokens=528,
    kv_gb=8.0,
    plain_kv_tokens=262_144,
    store_memory_gb=100.0,
    worker_memory_gb=None,
    repeats=3,
    loop_s=10.0,
    near_tie=BFLOAT16_NEAR_TIE,
)
ON_CPU = Scale(
    device="cpu",
    attention_backend="torch_native",
    streams=(1, 8),
    prompt_tokens=16,
    short_tokens=4,
    long_tokens=36,
    kv_gb=0.1,
    plain_kv_tokens=40_000,
    store_memory_gb=1.0,
    worker_memory_gb=1.0,
    repeats=5,
    loop_s=3.0,
    near_tie=FLOAT32_NEAR_TIE,
)


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts that share no beginning, of ids that every model here has."""
    return [
        [6 + ((seed * 64 + index) * 7919 + position * 104729) % 900 for position in range(length)]
        for index in range(count)
    ]


def model_folder(size: str, models: Path) -> Path:
    """The checkpoint of a size, written if need be."""
    if size == TINY:
        return make_tiny_models(models / "tiny", report=print)[0]
    write_random_model(models / size, SHAPES[size], 1 + list(SHAPES).index(size))
    return models / size


@asynccontextmanager
async def system_of(
    paths: dict[str, Path], scale: Scale, log: Path, environment: dict[str, str]
) -> AsyncIterator[CommandedSystem]:
    """A system with these models, none of them started."""
    settings = {
        "PRISM_MAX_RUNNING_REQUESTS": "64",
        "PRISM_ATTENTION_BACKEND": scale.attention_backend,
        **environment,
    }
    with tempfile.TemporaryDirectory(prefix="prism-bench-") as scratch:
        async with commanded_system(
            paths,
            Path(scratch),
            kv_gb=scale.kv_gb,
            log=log.with_suffix(".system.log"),
            device=scale.device,
            worker_memory_gb=scale.worker_memory_gb,
            store_memory_gb=scale.store_memory_gb,
            environment=settings,
        ) as system:
            yield system
