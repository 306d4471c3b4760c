"""What a sleeping engine's GPU memory consists of, and what settings would cut of it.

Engines note what the driver and torch count after each stage of their life (PRISM_TRACE_FOOTPRINT).
"""

import asyncio
from pathlib import Path

from prism.bench.activation.footprint_lines import footprint_rows
from prism.bench.activation.woken import ANSWER_TOKENS, prompt_of, system_of, wake
from prism.bench.results import Row, row
from prism.common.messages.placement import CommandKind

VARIANTS: dict[str, dict[str, str]] = {
    "as_it_is": {},
    # Hopper's default: 32 MiB a stream and handle, in place of our 8.
    "large_workspaces": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    "few_graphs": {"PRISM_DECODE_GRAPH_SIZES": "1,8,64"},
    "no_graphs": {"PRISM_DECODE_GRAPH_SIZES": "none"},
    # kvcached keeps a page of zeroes: of all layers together in its default layout, 2 MiB in this one.
    "kv_by_layer": {"KVCACHED_CONTIGUOUS_LAYOUT": "false"},
    # For a kvcached built with deploy/kvcached/optional-zero-page.patch; any other passes it over.
    "no_zero_page": {"KVCACHED_ZERO_PAGE": "false"},
    "eager_modules": {"CUDA_MODULE_LOADING": "EAGER"},
}


async def footprint_cell(variant: str, size: str, models: Path, log: Path) -> list[Row]:
    """Start, ask, doze, wake and doze one model, with memory noted on the way."""
    environment = {"PRISM_TRACE_FOOTPRINT": "1", **VARIANTS[variant]}
    async with system_of([size], models, log, environment=environment) as system:
        await system.command(CommandKind.ACTIVATE, size)
        said = (await system.complete(size, prompt_of(1), ANSWER_TOKENS)).text
        await system.command(CommandKind.DOZE, size)
        woken = await wake(system, size, prompt_of(1))
        await system.command(CommandKind.DOZE, size)
    noted = await asyncio.to_thread(log.read_text)
    rows = footprint_rows(f"footprint_{variant}", size, noted.splitlines())
    return [*rows, row(f"footprint_{variant}_mismatches", int(woken.text != said), "count", target=0)]
