"""KV memory that moves between two models of one GPU: how soon it follows demand, and what it costs."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nats.aio.msg import Msg

from prism.bench.activation.commanded_system import CommandedSystem
from prism.bench.activation.woken import MIB
from prism.bench.decode.measured_systems import Scale, prompts_of, system_of
from prism.bench.decode.plain_engine import Batch
from prism.bench.decode.sides import GatewaySide
from prism.bench.gpu_processes import gpu_used_bytes
from prism.bench.results import Row, row
from prism.bench.simulation.model_config import read_model_facts
from prism.common import subjects
from prism.common.messages.codec import decode
from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.placement import CommandKind
from prism.scheduling.memory import kv_bytes_per_token, weights_bytes

FOLLOW_TARGET_S = 0.3
SAMPLE_S = 0.02
# What a worker on a GPU leaves free beside the memory that it hands out, and counts for an engine.
ACTIVATION_SLACK_MIB = 4096
ENGINE_GB = 1.08


@dataclass(frozen=True)
class Moving:
    """What is moved. `shared_gb` is all KV memory of the GPU, in 10^9 bytes, of which each model may have
    `most_gb` and a burst of `requests` wants about `wanted_gb`; `fixed_gb` an engine takes beside, and an
    element of weights or KV `element_bytes`, None for the checkpoint's own."""

    shared_gb: float
    most_gb: float
    wanted_gb: float
    fixed_gb: float
    element_bytes: int | None
    requests: int
    new_tokens: int


MOVED_ON_GPU = Moving(14.0, 12.0, 9.0, ENGINE_GB, None, requests=64, new_tokens=256)
MOVED_ON_CPU = Moving(0.045, 0.04, 0.03, 0.0, 4, requests=12, new_tokens=48)


def follow_s(loads: Sequence[tuple[float, ModelLoad]], begun_bytes: int) -> float | None:
    """Seconds from the first report of one model, of (seconds, load), that tells of more demand than its
    quota at the beginning, to the first whose quota covers that, or is as large as it ever became. None when
    there was no such demand, or no memory came."""
    first = next((each for each in loads if each[1].kv_wanted_bytes > begun_bytes), None)
    if first is None:
        return None
    needed = min(first[1].kv_wanted_bytes, max(load.kv_quota_bytes for _, load in loads))
    if needed <= begun_bytes:
        return None
    return next(at for at, load in loads if at >= first[0] and load.kv_quota_bytes >= needed) - first[0]


class _Watched:
    """Every load report since it was made, and what the driver counted for engines."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, LoadReport]] = []
        self.used_bytes: list[int] = []

    async def on_load(self, message: Msg) -> None:
        self.reports.append((time.monotonic(), decode(message.data, LoadReport)))

    def of(self, model: str, since: float) -> list[tuple[float, ModelLoad]]:
        return [
            (at, load)
            for at, report in self.reports
            if at >= since
            for load in report.models
            if load.model == model
        ]

    async def sample_gpu(self) -> None:
        while True:
            self.used_bytes.append(sum((await asyncio.to_thread(gpu_used_bytes)).values()))
            await asyncio.sleep(SAMPLE_S)


async def moving_kv_cell(
    paths: dict[str, Path], scale: Scale, moving: Moving, log: Path, *, name: str
) -> list[Row]:
    """Bursts to one model, then to the other, and again: each takes memory of the one that is idle then."""
    worker_gb = await asyncio.to_thread(_worker_memory_gb, paths, moving)
    asked = replace(scale, kv_gb=moving.most_gb, worker_memory_gb=worker_gb)
    watched = _Watched()
    short = 0
    follows: dict[str, list[float | None]] = {model: [] for model in paths}
    peaks: dict[str, int] = dict.fromkeys(paths, 0)
    async with system_of(paths, asked, log, {}) as system:
        await system.bus.subscribe(subjects.load("*"), watched.on_load, inline=True)
        for model in paths:
            await system.command(CommandKind.ACTIVATE, model)
        sampler = (
            asyncio.create_task(watched.sample_gpu(), name="GPU sampler") if scale.device == "cuda" else None
        )
        try:
            for seed, model in enumerate([*paths, *paths]):
                begun = await _quota(watched, model)
                since = time.monotonic()
                short += await _burst(system, model, moving, seed)
                loads = watched.of(model, since)
                follows[model].append(follow_s(loads, begun))
                peaks[model] = max([peaks[model], *(load.kv_quota_bytes for _, load in loads)])
        finally:
            if sampler is not None:
                sampler.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sampler
    return _rows(name, watched, follows, peaks, short, moving, worker_gb)


def _worker_memory_gb(paths: dict[str, Path], moving: Moving) -> float:
    """Both models' weights and engines, and what they share."""
    facts = [read_model_facts(model, str(path)) for model, path in paths.items()]
    weights = sum(weights_bytes(each, moving.element_bytes) for each in facts)
    return weights / 1e9 + len(paths) * moving.fixed_gb + moving.shared_gb


async def _reported(watched: _Watched) -> None:
    """Wait for one more report."""
    seen = len(watched.reports)
    async with asyncio.timeout(10):
        while len(watched.reports) == seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _quota(watched: _Watched, model: str) -> int:
    await _reported(watched)
    return watched.of(model, 0.0)[-1][1].kv_quota_bytes


async def _burst(system: CommandedSystem, model: str, moving: Moving, seed: int) -> int:
    """Ask for what wants the memory; how many answers were not whole."""
    token = kv_bytes_per_token(system.facts[model], moving.element_bytes)
    length = int(moving.wanted_gb * 1e9 / moving.requests / token) - moving.new_tokens
    prompts = prompts_of(moving.requests, length, seed + 1)
    answered = await GatewaySide(system.http, model).generate(Batch(prompts, moving.new_tokens))
    return sum(len(output) != moving.new_tokens for output in answered.outputs)


def _rows(
    name: str,
    watched: _Watched,
    follows: dict[str, list[float | None]],
    peaks: dict[str, int],
    short: int,
    moving: Moving,
    worker_gb: float,
) -> list[Row]:
    rows = []
    for model, seconds in follows.items():
        followed = [each for each in seconds if each is not None]
        figure = f"{name}_{model}".replace("-", "_")
        note = f"worst of {len(followed)} bursts, as the worker reports them; {moving.requests} requests each"
        rows += [
            row(
                f"{figure}_follow_s",
                round(max(followed), 3) if followed else None,
                "s",
                target=FOLLOW_TARGET_S,
                note=note,
            ),
            row(
                f"{figure}_peak_gb",
                round(peaks[model] / 1e9, 4),
                "GB",
                note=f"of {moving.shared_gb:g} shared",
            ),
        ]
    over = sum(report.memory_reserved_bytes > report.memory_limit_bytes for _, report in watched.reports)
    rows += [
        row(
            f"{name}_answers_cut",
            short,
            "count",
            target=0,
            better="equal",
            note="answers with fewer tokens than asked for",
        ),
        row(
            f"{name}_reports_over_limit",
            over,
            "count",
            target=0,
            better="equal",
            note=f"of {len(watched.reports)} reports",
        ),
    ]
    if watched.used_bytes:
        above = max(0, max(watched.used_bytes) - worker_gb * 1e9) / MIB
        note = f"warm shells included; the most of {len(watched.used_bytes)} samples"
        rows.append(
            row(f"{name}_gpu_over_worker_mib", round(above), "MiB", target=ACTIVATION_SLACK_MIB, note=note)
        )
    return rows
