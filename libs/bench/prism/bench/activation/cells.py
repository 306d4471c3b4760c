"""The cells of the activation benchmark: each measures one thing in minutes on a GPU, and runs alone."""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
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
    """One wake, in seconds: from the command to the first byte of an answer, of the copy, of the command,
    from its end to the request on the bus, from there to its first token on the bus; and what was said."""

    first_token_s: float
    copy_s: float
    command_s: float
    to_request_s: float
    to_token_frame_s: float
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
    # The first frame says that the request was taken.
    token_at = system.framed_at[1] if len(system.framed_at) > 1 else answer.first_byte_at
    return Woken(
        first_token_s=answer.first_byte_at - began,
        copy_s=copy_s,
        command_s=told - began,
        to_request_s=system.requested_at - told,
        to_token_frame_s=token_at - system.requested_at,
        text=answer.text,
    )


async def wake_cell(sizes: list[str], models: Path, log: Path) -> list[Row]:
    """Starting, dozing and waking models one by one: times, memory, and whether they say the same then."""
    bandwidth = await asyncio.to_thread(pinned_bandwidth)
    rows = [row("pinned_bandwidth_gb_per_s", round(bandwidth / 1e9, 2), "GB/s")]
    began = time.monotonic()
    async with system_of(sizes, models, log) as system:
        rows.append(row(f"worker_up_{sizes[0]}_s", round(time.monotonic() - began, 2), "s"))
        for size in sizes:
            rows += await _woken_again_and_again(system, size, bandwidth)
    return rows


async def _woken_again_and_again(system: CommandedSystem, size: str, bandwidth: float) -> list[Row]:
    started = await system.command(CommandKind.ACTIVATE, size)
    prompt = prompt_of(1)
    undisturbed = (await system.complete(size, prompt, ANSWER_TOKENS)).text
    awake = []
    for seed in range(2, 2 + WAKES):
        asked = time.monotonic()
        awake.append((await system.complete(size, prompt_of(seed), ANSWER_TOKENS)).first_byte_at - asked)
    pid = engine_pid(size)
    active_bytes = gpu_used_bytes()[pid]
    wakes, dozes, dozing_bytes = [], [], []
    for _ in range(WAKES):
        outcome = await system.command(CommandKind.DOZE, size)
        dozes.append(outcome.seconds["total"])
        dozing_bytes.append(gpu_used_bytes()[pid])
        await asyncio.sleep(SETTLE_S)
        wakes.append(await wake(system, size, prompt))
    await system.command(CommandKind.DOZE, size)
    weights = weights_bytes(system.facts[size], None)
    first = _median(each.first_token_s for each in wakes)
    copy_s = _median(each.copy_s for each in wakes)
    floor = weights / bandwidth
    target = WAKE_TARGETS_S.get(size, round(floor + WAKE_OVERHEAD_S, 3))
    note = f"{weights / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s take {floor:.3f} s; median of {WAKES}"
    share_note = "of the pinned bandwidth measured in the same run; mapping the memory included"
    said_note = f"answers of {ANSWER_TOKENS} greedy tokens that differ from that before the first doze"
    mismatches = sum(each.text != undisturbed for each in wakes)
    return [
        *(
            row(f"first_build_{size}_{phase}_s", round(seconds, 3), "s")
            for phase, seconds in sorted(started.seconds.items())
        ),
        row(
            f"wake_{size}_first_token_s",
            first,
            "s",
            target=target,
            note=note,
        ),
        row(f"wake_{size}_command_s", _median(w.command_s for w in wakes), "s"),
        row(f"wake_{size}_to_request_s", _median(w.to_request_s for w in wakes), "s"),
        row(f"wake_{size}_to_token_frame_s", _median(w.to_token_frame_s for w in wakes), "s"),
        row(f"awake_{size}_first_token_s", _median(awake), "s", note="the same request to an active model"),
        row(f"wake_{size}_copy_s", copy_s, "s"),
        row(
            f"wake_{size}_copy_share",
            round(floor / copy_s, 4) if copy_s else None,
            "ratio",
            target=COPY_SHARE_TARGET,
            better="higher",
            note=share_note,
        ),
        row(f"doze_{size}_s", _median(dozes), "s", target=DOZE_TARGET_S, note="memory confirmed free"),
        row(f"doze_{size}_worst_s", round(max(dozes), 4), "s"),
        row(
            f"dozing_footprint_{size}_mib",
            round(max(dozing_bytes) / MIB),
            "MiB",
            target=FOOTPRINT_TARGET_MIB,
            note="as the driver counts it",
        ),
        row(f"active_{size}_mib", round(active_bytes / MIB), "MiB"),
        row(f"wake_{size}_mismatches", mismatches, "count", target=0, better="equal", note=said_note),
    ]


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 4)


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
        f"wake_{size}": partial(wake_cell, [size], models, log) for size in SHAPES
    }
    named["wake_small"] = partial(wake_cell, ["1b", "3b", "8b"], models, log)
    named["cycles"] = partial(cycles_cell, ["1b", "3b", "8b"], cycles, models, log)
    return named
