"""How fast models doze and wake, what they hold meanwhile, and whether many cycles change anything."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from prism.bench.activation.bus_bandwidth import pinned_bandwidth
from prism.bench.activation.commanded_system import CommandedSystem
from prism.bench.activation.woken import (
    ANSWER_TOKENS,
    MIB,
    SETTLE_S,
    Woken,
    median,
    prompt_of,
    system_of,
    wake,
)
from prism.bench.gpu_processes import engine_pid, gpu_used_bytes
from prism.bench.results import Row, row
from prism.common.messages.placement import CommandKind
from prism.scheduling.memory import weights_bytes

WAKES = 7
WAKE_OVERHEAD_S = 0.060
WAKE_TARGETS_S = {"8b": 0.36, "70b_fp8": 1.4}
DOZE_TARGET_S = 0.060
FOOTPRINT_SIZE = "8b"
FOOTPRINT_TARGET_MIB = 800
COPY_SHARE_TARGET = 0.97
DOZE_PHASES = {
    "unmap": "weights, in the engine",
    "kv": "KV cache and what torch holds, in the engine",
    "confirm": "until the driver counts no more",
}


async def wake_cell(
    sizes: list[str], models: Path, log: Path, *, tp_size: int = 1, buses: int = 1, cycles: int = 0
) -> list[Row]:
    """Starting, dozing and waking models one by one: times, memory, and whether they say the same then.

    Of a model on `tp_size` GPUs memory is that of the first, and the floor what one GPU's bus takes for its
    part of the weights. With several `buses` as many workers lend theirs to each other. After that they take
    turns for so many `cycles`.
    """
    bandwidth = await asyncio.to_thread(pinned_bandwidth)
    rows = [row("pinned_bandwidth_gb_per_s", round(bandwidth / 1e9, 2), "GB/s")]
    began = time.monotonic()
    environment = {"PRISM_LEND_BUS": "1"} if buses > 1 else {}
    async with system_of(
        sizes, models, log, tp_size=tp_size, workers=buses, environment=environment
    ) as system:
        up_s = round(time.monotonic() - began, 2)
        rows.append(row(f"worker_up_{_named(sizes[0], tp_size, buses)}_s", up_s, "s"))
        for size in sizes:
            rows += await _woken_again_and_again(system, size, bandwidth, tp_size, buses)
        return [*rows, *(await _cycled(system, sizes, cycles) if cycles else ())]


def _named(size: str, tp_size: int, buses: int) -> str:
    name = size if tp_size == 1 else f"{size}_tp{tp_size}"
    return name if buses == 1 else f"{name}_over_{buses}_buses"


async def _woken_again_and_again(
    system: CommandedSystem, size: str, bandwidth: float, tp_size: int, buses: int
) -> list[Row]:
    weights = weights_bytes(system.facts[size], None, tp_size)
    to_be_written = system.disk_has_room_for(weights * tp_size)
    images = system.images_on_disk + tp_size
    started = await system.command(CommandKind.ACTIVATE, size)
    prompt = prompt_of(1)
    undisturbed = (await system.complete(size, prompt, ANSWER_TOKENS)).text
    awake = []
    for seed in range(2, 2 + WAKES):
        asked = time.monotonic()
        awake.append((await system.complete(size, prompt_of(seed), ANSWER_TOKENS)).first_byte_at - asked)
    pid = engine_pid(size)
    active_bytes = gpu_used_bytes()[pid]
    pins = len(system.pinned) + tp_size
    await system.doze_once_imaged(size)
    written = to_be_written and await system.images_written(images)
    pinned = await system.until_pinned(pins)
    await system.command(CommandKind.ACTIVATE, size)
    wakes: list[Woken] = []
    dozes: list[dict[str, float]] = []
    dozing_bytes: list[int] = []
    for _ in range(WAKES):
        # Idle models doze. Right after an answer an engine still computes a step that it had begun before it
        # knew of the end: to read 71 GB of weights takes 15 ms.
        await asyncio.sleep(SETTLE_S)
        outcome = await system.command(CommandKind.DOZE, size)
        dozes.append(outcome.seconds)
        dozing_bytes.append(gpu_used_bytes()[pid])
        await asyncio.sleep(SETTLE_S)
        wakes.append(await wake(system, size, prompt))
    await system.command(CommandKind.DOZE, size)
    first = median(each.first_token_s for each in wakes)
    copy_s = median(each.copy_s for each in wakes)
    floor = weights / (bandwidth * buses)
    name = _named(size, tp_size, buses)
    target = WAKE_TARGETS_S.get(name, round(floor + WAKE_OVERHEAD_S, 3))
    note = (
        f"{weights / 1e9:.2f} GB at {buses * bandwidth / 1e9:.1f} GB/s take {floor:.3f} s; median of {WAKES}"
    )
    note += "" if written else "; the image was not on disk by then"
    note += "" if pinned else "; it was not pinned by then"
    share_note = (
        "of the pinned bandwidth measured in the same run; mapping the memory included, by the GPU's clock"
    )
    share_note += f" (that of the first of {tp_size})" if tp_size > 1 else ""
    if buses > 1:
        share_note = f"of {buses} times the pinned bandwidth of one, from first to last by the engine's clock"
    said_note = f"answers of {ANSWER_TOKENS} greedy tokens that differ from that before the first doze"
    mismatches = sum(each.text != undisturbed for each in wakes)
    return [
        *(
            row(f"first_build_{name}_{phase}_s", round(seconds, 3), "s")
            for phase, seconds in sorted(started.seconds.items())
        ),
        row(
            f"wake_{name}_first_token_s",
            first,
            "s",
            target=target,
            note=note,
        ),
        row(f"wake_{name}_command_s", median(w.command_s for w in wakes), "s"),
        row(f"wake_{name}_until_request_s", median(w.until_request_s for w in wakes), "s"),
        row(f"wake_{name}_to_token_frame_s", median(w.to_token_frame_s for w in wakes), "s"),
        row(f"awake_{name}_first_token_s", median(awake), "s", note="the same request to an active model"),
        row(f"wake_{name}_copy_s", copy_s, "s"),
        row(
            f"wake_{name}_copy_share",
            round(floor / copy_s, 4) if copy_s else None,
            "ratio",
            target=COPY_SHARE_TARGET if buses == 1 else None,
            better="higher",
            note=share_note,
        ),
        row(
            f"doze_{name}_s",
            median(doze["total"] for doze in dozes),
            "s",
            target=DOZE_TARGET_S,
            note=f"memory confirmed free; idle for {SETTLE_S:.1f} s before",
        ),
        row(f"doze_{name}_worst_s", round(max(doze["total"] for doze in dozes), 4), "s"),
        *(
            row(f"doze_{name}_{phase}_s", median(doze.get(phase, 0.0) for doze in dozes), "s", note=note)
            for phase, note in DOZE_PHASES.items()
        ),
        row(
            f"dozing_footprint_{name}_mib",
            round(max(dozing_bytes) / MIB),
            "MiB",
            note="as the driver counts it",
        ),
        *(_dozing_footprint(dozing_bytes) if name == FOOTPRINT_SIZE else ()),
        row(f"active_{name}_mib", round(active_bytes / MIB), "MiB"),
        row(f"wake_{name}_mismatches", mismatches, "count", target=0, better="equal", note=said_note),
    ]


def _dozing_footprint(dozing_bytes: Sequence[int]) -> list[Row]:
    value = round(max(dozing_bytes) / MIB)
    note = f"an {FOOTPRINT_SIZE.upper()}, as the driver counts it; the rows beside it have the other sizes"
    return [row("dozing_footprint_mib", value, "MiB", target=FOOTPRINT_TARGET_MIB, note=note)]


async def cycles_cell(sizes: list[str], cycles: int, models: Path, log: Path) -> list[Row]:
    """Many sleep and wake cycles over several models: nothing may grow, nothing may be said otherwise."""
    async with system_of(sizes, models, log) as system:
        return await _cycled(system, sizes, cycles)


async def _cycled(system: CommandedSystem, sizes: list[str], cycles: int) -> list[Row]:
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
