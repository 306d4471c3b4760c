"""Load on a stack, and what it came to."""

import asyncio
import sys
import time
from dataclasses import dataclass

import msgspec

from prism.bench.gateway.cores import ALL
from prism.bench.gateway.load import LoadOrder, LoadReport
from prism.bench.gateway.stacks import Stack

LOAD_DEADLINE_S = 180.0
MOST_LOAD_PROCESSES = 6
FEWEST_LOAD_PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """What one load came to; times in milliseconds. `cpu_s` is the gateway's, `wall_s` the load's, which
    `load_processes` processes made."""

    tokens: int
    requests: int
    lags_ms: list[float]
    first_ms: list[float]
    failures: list[str]
    cpu_s: float
    wall_s: float
    load_processes: int

    @property
    def tokens_per_cpu_s(self) -> float:
        """Tokens per second of the gateway's CPU time."""
        return self.tokens / self.cpu_s

    @property
    def requests_per_cpu_s(self) -> float:
        """Requests per second of the gateway's CPU time."""
        return self.requests / self.cpu_s

    @property
    def busy(self) -> float:
        """Cores that the gateway kept busy."""
        return self.cpu_s / self.wall_s


def percentile(values: list[float], share: float) -> float | None:
    """The value below which `share` (0 to 1) of `values` lie; None without any."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def processes_for(streams: int, models: int) -> int:
    """How many load processes: half of the cores, but two at least, lest one reads all streams, and one a
    model; not more than streams."""
    wanted = max(models, FEWEST_LOAD_PROCESSES, min(MOST_LOAD_PROCESSES, len(ALL) // 2))
    return max(1, min(wanted, streams))


async def measure(
    stack: Stack, streams: int, tokens: int, *, rounds: int = 0, seconds: float = 0.0
) -> Measured:
    """Run `streams` streams of `tokens` tokens each: `rounds` times, or for `seconds`."""
    count = processes_for(streams, len(stack.models))
    shares = [streams // count + (index < streams % count) for index in range(count)]
    orders = [
        LoadOrder(
            stack.host,
            stack.port,
            stack.models[index % len(stack.models)],
            share,
            tokens,
            rounds,
            seconds,
        )
        for index, share in enumerate(shares)
    ]
    processes = [await _start(order) for order in orders]
    try:
        async with asyncio.timeout(LOAD_DEADLINE_S):
            for process in processes:
                assert process.stdout is not None
                if (await process.stdout.readline()).strip() != b"ready":
                    raise RuntimeError(f"a load process could not connect to {stack.name}")
            cpu, began = stack.cpu_s(), time.monotonic()
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(b"go\n")
            reports = await asyncio.gather(*(reported(process) for process in processes))
            cpu, wall = stack.cpu_s() - cpu, time.monotonic() - began
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
    return Measured(
        tokens=sum(report.tokens for report in reports),
        requests=sum(report.requests for report in reports),
        lags_ms=[lag / 1000 for report in reports for lag in report.lags_us],
        first_ms=[first / 1000 for report in reports for first in report.first_us],
        failures=[failure for report in reports for failure in report.failures],
        cpu_s=max(cpu, 1e-9),
        wall_s=wall,
        load_processes=count,
    )


async def _start(order: LoadOrder) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "prism.bench.gateway.load",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 28,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(order) + b"\n")
    return process


async def reported(process: asyncio.subprocess.Process) -> LoadReport:
    """What a load process came to; one that ends without a word, or with one that is no report, is a failure
    of the reading."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    try:
        return msgspec.json.decode(line, type=LoadReport)
    except msgspec.DecodeError as error:
        if line.endswith(b"\n"):
            return LoadReport(failures=[f"a load process said what is no report: {error}"])
        status = await process.wait()
        return LoadReport(failures=[f"a load process ended without its report, with status {status}"])
