"""The cells of the activation benchmark: each measures one thing in minutes on a GPU, and runs alone."""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pynvml

from prism.bench.activation.bus_bandwidth import pinned_bandwidth
from prism.bench.activation.commanded_system import CommandedSystem, commanded_system
from prism.bench.activation.random_models import SHAPES, write_random_model
from prism.bench.results import Row, row
from prism.common.messages.placement import CommandKind
from prism.scheduling.memory import weights_bytes

MIB = 1 << 20
PROMPT_TOKENS = 128
ANSWER_TOKENS = 16
WAKES = 7
KV_GB = 2.0
WAKE_OVERHEAD_S = 0.060
WAKE_TARGETS_S = {"8b": 0.36}
DOZE_TARGET_S = 0.060
FOOTPRINT_TARGET_MIB = 800
COPY_SHARE_TARGET = 0.97
SETTLE_S = 0.5


@dataclass(frozen=True)
class Woken:
    """One wake: seconds from the command to the first byte of an answer, of the copy, and what was said."""

    first_token_s: float
    copy_s: float
    command_s: float
    text: str


@asynccontextmanager
async def system_of(sizes: list[str], models: Path, log: Path) -> AsyncIterator[CommandedSystem]:
    """A system with random models of these sizes, none of them started."""
    paths = {}
    for seed, size in enumerate(sizes):
        paths[size] = models / size
        await asyncio.to_thread(write_random_model, paths[size], SHAPES[size], seed + 1)
    with tempfile.TemporaryDirectory(prefix="prism-bench-") as scratch:
        async with commanded_system(paths, Path(scratch), kv_gb=KV_GB, log=log) as system:
            yield system


def prompt_of(seed: int) -> list[int]:
    """PROMPT_TOKENS token ids that no other seed has as a prefix."""
    return [6 + (seed * 7919 + position * 104729) % 900 for position in range(PROMPT_TOKENS)]


def gpu_used_bytes() -> dict[int, int]:
    """GPU memory by process, as the driver counts it."""
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {
        int(process.pid): int(process.usedGpuMemory or 0)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    }


def engine_pid(model: str) -> int:
    """The process that hosts `model`."""
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).strip() == f"prism-engine {model}":
            return int(process.pid)
    raise LookupError(f"no engine of {model}")


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
    return Woken(answer.first_byte_at - began, copy_s, told - began, answer.text)


async def wake_cell(size: str, models: Path, log: Path) -> list[Row]:
    """Starting, dozing and waking one model: times, memory, and whether it says the same afterwards."""
    rows: list[Row] = []
    bandwidth = await asyncio.to_thread(pinned_bandwidth)
    began = time.monotonic()
    async with system_of([size], models, log) as system:
        rows.append(row(f"worker_up_{size}_s", round(time.monotonic() - began, 2), "s"))
        started = await system.command(CommandKind.ACTIVATE, size)
        rows += [
            row(f"first_build_{size}_{phase}_s", round(seconds, 3), "s")
            for phase, seconds in sorted(started.seconds.items())
        ]
        prompt = prompt_of(1)
        undisturbed = (await system.complete(size, prompt, ANSWER_TOKENS)).text
        pid = engine_pid(size)
        active_bytes = gpu_used_bytes()[pid]
        wakes, dozes, dozing_bytes = [], [], []
        for _ in range(WAKES):
            outcome = await system.command(CommandKind.DOZE, size)
            dozes.append(outcome.seconds["total"])
            dozing_bytes.append(gpu_used_bytes()[pid])
            await asyncio.sleep(SETTLE_S)
            wakes.append(await wake(system, size, prompt))
        weights = weights_bytes(system.facts[size], None)
    first = statistics.median(each.first_token_s for each in wakes)
    copy_s = statistics.median(each.copy_s for each in wakes)
    floor = weights / bandwidth
    target = WAKE_TARGETS_S.get(size, round(floor + WAKE_OVERHEAD_S, 3))
    note = f"{weights / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s take {floor:.3f} s; median of {WAKES}"
    footprint = max(dozing_bytes) / MIB
    rows += [
        row("pinned_bandwidth_gb_per_s", round(bandwidth / 1e9, 2), "GB/s"),
        row(f"wake_{size}_first_token_s", round(first, 4), "s", target=target, note=note),
        row(f"wake_{size}_command_s", round(statistics.median(w.command_s for w in wakes), 4), "s"),
        row(f"wake_{size}_copy_s", round(copy_s, 4), "s"),
        row(
            f"wake_{size}_copy_share",
            round(floor / copy_s, 4) if copy_s else None,
            "ratio",
            target=COPY_SHARE_TARGET,
            better="higher",
            note="of the pinned bandwidth measured in the same run",
        ),
        row(f"doze_{size}_s", round(statistics.median(dozes), 4), "s", target=DOZE_TARGET_S),
        row(f"doze_{size}_worst_s", round(max(dozes), 4), "s"),
        row(f"dozing_footprint_{size}_mib", round(footprint), "MiB", target=FOOTPRINT_TARGET_MIB),
        row(f"active_{size}_mib", round(active_bytes / MIB), "MiB"),
        row(
            f"wake_{size}_mismatches",
            sum(each.text != undisturbed for each in wakes),
            "count",
            target=0,
            better="equal",
            note=f"answers of {ANSWER_TOKENS} greedy tokens that differ from that before the first doze",
        ),
    ]
    return rows


async def cycles_cell(sizes: list[str], cycles: int, models: Path, log: Path) -> list[Row]:
    """Many sleep and wake cycles over several models: nothing may grow, nothing may be said otherwise."""
    async with system_of(sizes, models, log) as system:
        said: dict[str, str] = {}
        for size in sizes:
            await system.command(CommandKind.ACTIVATE, size)
            said[size] = (await system.complete(size, prompt_of(2), ANSWER_TOKENS)).text
            await system.command(CommandKind.DOZE, size)
        pids = [engine_pid(size) for size in sizes]
        mismatches = 0
        gpu: list[int] = []
        rss: list[int] = []
        for cycle in range(cycles):
            size = sizes[cycle % len(sizes)]
            woken = await wake(system, size, prompt_of(2))
            mismatches += woken.text != said[size]
            await system.command(CommandKind.DOZE, size)
            used = gpu_used_bytes()
            gpu.append(sum(used[pid] for pid in pids))
            rss.append(sum(psutil.Process(pid).memory_info().rss for pid in pids))
    base = len(sizes) - 1
    growth = 100 * (gpu[-1] - gpu[base]) / gpu[base]
    note = f"{cycles} cycles over {', '.join(sizes)}"
    return [
        row("cycles", cycles, "count", note=note),
        row(
            "cycles_gpu_growth_pct",
            round(growth, 3),
            "%",
            target=1.0,
            note="all asleep, from round one on",
        ),
        row("cycles_rss_growth_pct", round(100 * (rss[-1] - rss[base]) / rss[base], 2), "%"),
        row("cycles_mismatches", mismatches, "count", target=0, better="equal"),
    ]


def cells(models: Path, log: Path) -> dict[str, Callable[[], Awaitable[list[Row]]]]:
    """Every cell by name, to be called and awaited."""
    cycles = int(os.environ.get("PRISM_BENCH_CYCLES", "200"))
    named: dict[str, Callable[[], Awaitable[list[Row]]]] = {
        f"wake_{size}": partial(wake_cell, size, models, log) for size in SHAPES
    }
    named["cycles"] = partial(cycles_cell, ["1b", "3b", "8b"], cycles, models, log)
    return named
