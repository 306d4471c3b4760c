"""How fast a model is frozen and comes back, and what it holds meanwhile."""

import asyncio
from pathlib import Path

from prism.bench.activation.woken import (
    ANSWER_TOKENS,
    MIB,
    SETTLE_S,
    median,
    prompt_of,
    system_of,
    wake,
)
from prism.bench.gpu_processes import engine_pid, gpu_used_bytes
from prism.bench.results import Row, row
from prism.common.messages.placement import CommandKind

FREEZES = 5
FREEZE_TARGET_S = 1.2
THAW_TARGET_S = 1.0


async def freeze_cell(size: str, models: Path, log: Path) -> list[Row]:
    """Freeze and wake one model again and again: from dozing to frozen, from frozen to the first token."""
    frozen, thawed, held = [], [], []
    mismatches = 0
    async with system_of([size], models, log) as system:
        await system.command(CommandKind.ACTIVATE, size)
        undisturbed = (await system.complete(size, prompt_of(1), ANSWER_TOKENS)).text
        pid = engine_pid(size)
        for _ in range(FREEZES):
            await system.command(CommandKind.DOZE, size)
            frozen.append((await system.command(CommandKind.FREEZE, size)).seconds)
            held.append(gpu_used_bytes().get(pid, 0))
            await asyncio.sleep(SETTLE_S)
            woken = await wake(system, size, prompt_of(1))
            thawed.append(woken)
            mismatches += woken.text != undisturbed
    freeze_s, thaw_s = median(each["total"] for each in frozen), median(w.first_token_s for w in thawed)
    phases = {f"freeze_{size}_{name}_s": median(each[name] for each in frozen) for name in frozen[0]}
    phases |= {f"thaw_{size}_{name}_s": median(w.phases[name] for w in thawed) for name in thawed[0].phases}
    del phases[f"freeze_{size}_total_s"]
    note = "answers after a thaw that differ from that before the first freeze"
    return [
        row("frozen_footprint_mib", round(max(held) / MIB), "MiB", target=0, note="as the driver counts it"),
        row(
            f"freeze_{size}_s",
            freeze_s,
            "s",
            target=FREEZE_TARGET_S,
            note=f"from dozing; median of {FREEZES}",
        ),
        row(f"thaw_{size}_first_token_s", thaw_s, "s", target=THAW_TARGET_S, note=f"median of {FREEZES}"),
        *(row(figure, seconds, "s") for figure, seconds in phases.items()),
        row(f"thaw_{size}_mismatches", mismatches, "count", target=0, better="equal", note=note),
    ]
