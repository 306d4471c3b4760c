"""The cells of the activation benchmark: each measures one thing in minutes, and runs alone."""

import os
from functools import partial
from pathlib import Path

from prism.bench.activation.footprint import VARIANTS, footprint_cell
from prism.bench.activation.freezing import freeze_cell
from prism.bench.activation.random_models import SHAPES
from prism.bench.activation.releasing import releasing_cell
from prism.bench.activation.staging import stage_cell
from prism.bench.activation.starting import cold_start_cell, staged_cell
from prism.bench.activation.waking import cycles_cell, wake_cell
from prism.bench.cell_commands import Cell

MOST_CYCLES = "200"
SMALL = ["1b", "3b", "8b"]


def cells(models: Path, log: Path) -> dict[str, Cell]:
    """Every cell by name. Only those named stage_... run where there is no GPU."""
    cycles = int(os.environ.get("PRISM_BENCH_CYCLES", MOST_CYCLES))
    named: dict[str, Cell] = {
        f"stage_{size}": partial(stage_cell, size, models, log) for size in ("tiny", "1b", "8b")
    }
    named |= {f"wake_{size}": partial(wake_cell, [size], models, log) for size in SHAPES}
    named |= {
        "wake_small": partial(wake_cell, SMALL, models, log),
        "wake_small_and_cycles": partial(wake_cell, SMALL, models, log, cycles=cycles),
        "wake_1b_tp2": partial(wake_cell, ["1b"], models, log, tp_size=2),
        "wake_8b_tp2": partial(wake_cell, ["8b"], models, log, tp_size=2),
        "wake_8b_over_2_buses": partial(wake_cell, ["8b"], models, log, buses=2),
        "wake_70b_fp8_over_2_buses": partial(wake_cell, ["70b_fp8"], models, log, buses=2),
        "freeze_8b": partial(freeze_cell, "8b", models, log),
        "freeze_1b": partial(freeze_cell, "1b", models, log),
        "staged_8b": partial(staged_cell, "8b", models, log, deferred=True),
        "staged_8b_with_graphs": partial(staged_cell, "8b", models, log, deferred=False),
        # Its weights are still being copied when the first graph could be captured.
        "staged_32b_with_graphs": partial(staged_cell, "32b", models, log, deferred=False),
        "cold_start": partial(cold_start_cell, "8b", models, log),
        "releasing": releasing_cell,
        "cycles": partial(cycles_cell, SMALL, cycles, models, log),
    }
    named |= {
        f"footprint_{variant}": partial(footprint_cell, variant, "8b", models, log) for variant in VARIANTS
    }
    return named
