"""What it costs to give GPU memory back, by size of piece and number of threads: the floor of every doze.

The measurement is a process of its own (`python -m prism.bench.activation.releasing`), which says its rows
in JSON on stdout.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from prism.bench.gpu_processes import gpu_environment
from prism.bench.results import Row, row

TOTAL_BYTES = 64 << 30
PIECE_BYTES = (256 << 20, 2 << 30, 16 << 30)
THREADS = (1, 4)
REPEATS = 3
DEADLINE_S = 120.0


async def releasing_cell() -> list[Row]:
    """Mapping, unmapping and freeing TOTAL_BYTES of a GPU, each the best of some repeats."""
    return await asyncio.to_thread(_measured)


def _measured() -> list[Row]:
    run = subprocess.run(
        [sys.executable, "-m", "prism.bench.activation.releasing"],
        stdout=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=True,
        env={**os.environ, **gpu_environment()},
    )
    return msgspec.json.decode(run.stdout.splitlines()[-1], type=list[Row])


def rows_of(piece_bytes: int, threads: int, seconds: dict[str, float]) -> list[Row]:
    """One row for each of `seconds`, by what was done with TOTAL_BYTES."""
    size = f"{piece_bytes >> 20}_mib"
    return [
        row(
            f"{what}_{size}_{threads}_threads_ms_per_gb",
            round(1000 * took / (TOTAL_BYTES / 1e9), 3),
            "ms/GB",
            note=f"best of {REPEATS}, {TOTAL_BYTES >> 30} GiB in pieces of {piece_bytes >> 20} MiB",
        )
        for what, took in seconds.items()
    ]


def _timed(work: Callable[[Any], object], items: Iterable[Any], pool: ThreadPoolExecutor) -> float:
    began = time.perf_counter()
    for _ in pool.map(work, items):
        pass
    return time.perf_counter() - began


def main() -> None:
    """Measure on the first GPU that this process sees."""
    import torch
    from cuda.bindings import driver

    from prism.gpu_worker.engine import cuda_driver

    def unmap(nbytes: int, offset: int) -> None:
        cuda_driver.check(driver.cuMemUnmap(address + offset, nbytes), "unmapping")

    def release(handle: Any) -> None:
        cuda_driver.check(driver.cuMemRelease(handle), "releasing")

    torch.zeros(1, device="cuda")
    context = cuda_driver.current_context()
    address = cuda_driver.reserve_addresses(TOTAL_BYTES)
    rows: list[Row] = []
    for piece in PIECE_BYTES:
        offsets = range(0, TOTAL_BYTES, piece)
        for threads in THREADS:
            best: dict[str, float] = {}
            with ThreadPoolExecutor(threads, "release", cuda_driver.use_context, (context,)) as pool:
                for _ in range(REPEATS):
                    began = time.perf_counter()
                    handles = [cuda_driver.map_memory(0, address + offset, piece) for offset in offsets]
                    took = {"map": time.perf_counter() - began}
                    # Memory that was never written might be given back in another way.
                    cuda_driver.fill_words(address, 1, TOTAL_BYTES)
                    torch.cuda.synchronize()
                    took["unmap"] = _timed(partial(unmap, piece), offsets, pool)
                    took["release"] = _timed(release, handles, pool)
                    best = {what: min(best.get(what, seconds), seconds) for what, seconds in took.items()}
            rows += rows_of(piece, threads, best)
    print(msgspec.json.encode(rows).decode(), flush=True)


if __name__ == "__main__":
    main()
