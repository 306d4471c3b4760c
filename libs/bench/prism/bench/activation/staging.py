"""How fast the model store brings a checkpoint into memory, against what disk and memory give."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from prism.bench.activation.random_models import SHAPES, write_random_model
from prism.bench.activation.raw_rates import copy_rate, drop_cached, read_rate
from prism.bench.results import Row, row
from prism.cli.nats_server import nats_server
from prism.cli.tiny_models import make_tiny_models
from prism.common.messages.store import LeaseRequest
from prism.common.store_client import lease

SHARE_TARGET = 0.9
START_DEADLINE_S = 30.0
STAGE_DEADLINE_S = 300.0
# From disk as often as the disk is read by itself, so that a moment of a faster disk is as likely for both.
REPEATS = {"disk": 1, "cached": 2}
TINY = "tiny"
MOST_THREADS = 16


def thread_counts() -> list[int]:
    """1, 4 and 16, or as many as the cores that this process may use."""
    cores = max(2, len(os.sched_getaffinity(0)))
    return sorted({min(count, cores) for count in (1, 4, MOST_THREADS)})


@asynccontextmanager
async def store_process(folder: Path, threads: int, memory_gb: float, log: Path) -> AsyncIterator[Path]:
    """A model store that reads with `threads` threads; yields its socket."""
    socket = folder / "store.sock"
    with nats_server(folder / "nats") as nats, log.open("a") as lines:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "prism.model_store", "--nats", nats.url, "--socket", str(socket)),
            *("--image-dir", str(folder / "images"), "--memory-gb", f"{memory_gb:.3f}"),
            *("--threads", str(threads)),
            stdout=lines,
            stderr=lines,
            env={**os.environ, "PRISM_PARENT_PID": str(os.getpid())},
        )
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                while not socket.exists():
                    if process.returncode is not None:
                        raise RuntimeError(f"the model store ended with status {process.returncode}: {log}")
                    await asyncio.sleep(0.02)
            yield socket
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def staging_s(model: Path, nbytes: int, threads: int, log: Path) -> float:
    """Seconds that a fresh store takes to stage `model`, of `nbytes` bytes."""
    with tempfile.TemporaryDirectory(prefix="prism-bench-") as folder:
        async with store_process(Path(folder), threads, 1.2 * nbytes / 1e9 + 0.1, log) as socket:
            request = LeaseRequest(model.name, str(model))
            granted = await asyncio.to_thread(lease, socket, request, STAGE_DEADLINE_S)
            with granted:
                return granted.seconds


def model_folder(size: str, models: Path) -> Path:
    """The checkpoint of a size, written if need be."""
    if size == TINY:
        return make_tiny_models(models / TINY, report=print)[-1]
    write_random_model(models / size, SHAPES[size], 1 + list(SHAPES).index(size))
    return models / size


async def stage_cell(size: str, models: Path, log: Path) -> list[Row]:
    """Staging from disk and from the page cache by thread count, and the host's own rates beside it."""
    model = await asyncio.to_thread(model_folder, size, models)
    files = sorted(model.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    if 2.5 * nbytes > psutil.virtual_memory().available:
        raise RuntimeError(f"{nbytes / 1e9:.1f} GB twice, in page cache and store, do not fit into this host")
    rows: list[Row] = []
    best: dict[str, tuple[float, int]] = {}
    disk: dict[int, float] = {}
    memory: dict[int, float] = {}
    for threads in thread_counts():
        disk[threads], memory[threads] = await asyncio.to_thread(_raw_rates, files, nbytes, threads)
        for source in ("disk", "cached"):
            seconds = []
            for _ in range(REPEATS[source]):
                await asyncio.to_thread(_prepare, files, source, threads)
                seconds.append(await staging_s(model, nbytes, threads, log))
            rows.append(row(f"stage_{size}_{source}_{threads}_threads_s", round(min(seconds), 4), "s"))
            best[source] = min(best.get(source, (float("inf"), 0)), (min(seconds), threads))
        rows.append(row(f"raw_disk_{threads}_threads_gb_per_s", round(disk[threads] / 1e9, 2), "GB/s"))
        rows.append(row(f"raw_copy_{threads}_threads_gb_per_s", round(memory[threads] / 1e9, 2), "GB/s"))
    slower = min(max(disk.values()), max(memory.values()))
    return [*staged_rows(size, nbytes, best, slower, max(memory.values())), *rows]


def _raw_rates(files: Sequence[Path], nbytes: int, threads: int) -> tuple[float, float]:
    """Reading from disk, and copying."""
    drop_cached(files)
    disk = read_rate(files, threads)
    return disk, max(copy_rate(nbytes, threads) for _ in range(REPEATS["cached"]))


def _prepare(files: Sequence[Path], source: str, threads: int) -> None:
    if source == "disk":
        drop_cached(files)
    else:
        read_rate(files, threads)


def staged_rows(
    size: str, nbytes: int, best: dict[str, tuple[float, int]], disk_limit: float, copy_limit: float
) -> list[Row]:
    """The best of each source against its limit, in bytes per second."""
    rows = []
    for source, limit in (("disk", disk_limit), ("cached", copy_limit)):
        seconds, threads = best[source]
        figure = f"stage_{size}_s" if source == "disk" else f"stage_{size}_cached_s"
        rate = nbytes / seconds
        note = f"{nbytes / 1e9:.2f} GB from {source} by {threads} threads, {rate / 1e9:.2f} GB/s"
        beside = (
            f"of {limit / 1e9:.2f} GB/s: the slower of disk and memory"
            if source == "disk"
            else (f"of {limit / 1e9:.2f} GB/s: copying into fresh shared memory, nothing hashed")
        )
        share = round(rate / limit, 4)
        rows.append(row(figure, round(seconds, 3), "s", note=note))
        rows.append(
            row(
                f"stage_{size}_{source}_share",
                share,
                "ratio",
                target=SHARE_TARGET if source == "disk" else None,
                better="higher",
                note=beside,
            )
        )
    return rows
