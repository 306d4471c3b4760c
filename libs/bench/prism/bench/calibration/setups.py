"""What the simulator is held against: which models on which device, and how they are asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prism.bench.activation.random_models import SHAPES, write_random_model
from prism.bench.simulation.simulation import Limits
from prism.cli.tiny_models import make_tiny_models

CPU_MODELS = ("tiny-llama", "tiny-qwen3")
CUDA_MODELS = ("1b", "3b")


@dataclass(frozen=True)
class Setup:
    """One device. `models` makes checkpoints in a folder, by name; memory in 10^9 bytes, `pool_gb` is each
    model's KV quota. `loads` are shares of the device's time, in the simulator's own costs; `prompts` and
    `outputs` the ranges of tokens; a check takes `check_s` seconds, in `parts` with a round of measurements
    after each, and with a part of the workload that is fitted to, `fit_s` in all. `limits` are those of its
    workers. `element_bytes` of a weight, None for the checkpoint's own.
    """

    device: str
    models: Callable[[Path], dict[str, Path]]
    pool_gb: float
    worker_gb: float
    context_bytes: int
    element_bytes: int | None
    dtype: str
    loads: tuple[float, ...]
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    check_s: float
    parts: int
    fit_s: float
    limits: Limits


def _tiny(folder: Path) -> dict[str, Path]:
    make_tiny_models(folder, report=lambda line: None)
    return {name: folder / name for name in CPU_MODELS}


def _random(folder: Path) -> dict[str, Path]:
    for seed, size in enumerate(CUDA_MODELS):
        write_random_model(folder / size, SHAPES[size], seed + 1)
    return {size: folder / size for size in CUDA_MODELS}


SETUPS = {
    "cpu": Setup(
        device="cpu",
        models=_tiny,
        pool_gb=0.15,
        worker_gb=1.0,
        context_bytes=0,
        element_bytes=4,
        dtype="float32",
        loads=(0.25, 0.5),
        prompts=(16, 400),
        outputs=(8, 48),
        check_s=240.0,
        parts=4,
        fit_s=160.0,
        limits=Limits(max_running=16, chunk_tokens=512, elastic=False, freezes=False),
    ),
    "cuda": Setup(
        device="cuda",
        models=_random,
        pool_gb=16.0,
        worker_gb=60.0,
        context_bytes=1 << 30,
        element_bytes=None,
        dtype="bfloat16",
        loads=(0.25, 0.5),
        prompts=(64, 2048),
        outputs=(16, 256),
        check_s=40.0,
        parts=4,
        fit_s=40.0,
        limits=Limits(max_running=64, chunk_tokens=2048, elastic=False, freezes=False),
    ),
}
