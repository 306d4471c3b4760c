"""Three models on a worker with room for two: all are served, and memory stays under the limit."""

import asyncio
import contextlib
import random
from pathlib import Path

import httpx
import psutil
import pytest
from tests.end_to_end.observing import Watcher, arena_bytes, engine_processes, generate, put_to_sleep

from prism.cli.demo import WORKER_MEMORY_GB
from prism.cli.system import RunningSystem
from prism.common.messages.models import ModelState

pytestmark = pytest.mark.engine

NAMES = ["tiny-llama", "tiny-qwen3", "tiny-llama-big"]
LIMIT_BYTES = int(WORKER_MEMORY_GB * 1e9)
SAMPLE_INTERVAL_S = 0.05


def held_at_one_instant(system: RunningSystem) -> int:
    """What stands behind all arenas of all engines, as the kernel counts it; never more than was there at
    once.

    Engines are looked at one after the other, and one can doze and the next wake between two looks. So each
    is looked at twice: the lower of both is what it held at the instant between the two rounds, or less.
    """
    processes = engine_processes(system).values()
    first = [arena_bytes(process.pid) for process in processes]
    second = [arena_bytes(process.pid) for process in processes]
    return sum(map(min, first, second))


async def sample_arenas(system: RunningSystem, samples: list[int]) -> None:
    """Note what all engines hold, again and again."""
    while True:
        samples.append(held_at_one_instant(system))
        await asyncio.sleep(SAMPLE_INTERVAL_S)


async def test_sixty_shuffled_requests_complete_within_the_memory_limit(
    system: RunningSystem, client: httpx.AsyncClient, watcher: Watcher
) -> None:
    requests = [(name, index) for name in NAMES for index in range(20)]
    random.Random(7).shuffle(requests)
    limit = asyncio.Semaphore(12)
    samples: list[int] = []
    sampler = asyncio.create_task(sample_arenas(system, samples))

    async def one(name: str, index: int) -> int:
        async with limit:
            return len(await generate(client, name, [10 + index] * (1 + index * 17), 24))

    try:
        lengths = await asyncio.gather(*(one(name, index) for name, index in requests))
    finally:
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            # A sampler that ended by itself says why.
            await sampler
    assert len(lengths) == 60
    assert min(lengths) >= 1
    assert len(samples) >= 10
    assert 0 < max(samples) <= LIMIT_BYTES
    assert all(report.memory_reserved_bytes <= LIMIT_BYTES for report in watcher.reports)
    used = [sum(m.weights_bytes + m.kv_used_bytes for m in report.models) for report in watcher.reports]
    assert 0 < max(used) <= LIMIT_BYTES
    assert sum(watcher.count("dozed", name) for name in NAMES) >= 1


async def test_dozing_takes_the_weights_out_of_the_engine_and_waking_brings_them_back(
    system: RunningSystem, client: httpx.AsyncClient, watcher: Watcher, tiny_models: dict[str, Path]
) -> None:
    big = "tiny-llama-big"
    weights = (tiny_models[big] / "model.safetensors").stat().st_size
    assert weights > 100e6
    await generate(client, big, [1, 2, 3], 4)
    engine = engine_processes(system)[big]
    awake = _memory(engine)
    await put_to_sleep(client, watcher, big, ["tiny-llama", "tiny-qwen3"])
    assert watcher.state(big) is ModelState.DOZING
    asleep = _memory(engine)
    assert awake - asleep >= 0.98 * weights
    await generate(client, big, [1, 2, 3], 4)
    assert engine_processes(system)[big].pid == engine.pid
    assert _memory(engine) - asleep >= 0.98 * weights


def _memory(process: psutil.Process) -> int:
    """Shared memory that is resident in a process: its arenas, and not what its heap does meanwhile."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "RssShmem":
            return int(value.split()[0]) * 1024
    raise LookupError(f"the kernel does not tell the shared memory of {process.pid}")
