"""`prism demo`: three tiny models on a worker that holds two, to be watched."""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import httpx
import msgspec
from nats.aio.msg import Msg

from prism.cli.system import SystemSettings, running_system
from prism.cli.table import aligned
from prism.cli.tiny_models import make_tiny_models
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode
from prism.common.messages.events import Event
from prism.common.messages.load import LoadReport
from prism.common.messages.models import InitialPlacement, ModelSpec

DEFAULT_FOLDER = Path.home() / ".cache" / "prism" / "tiny-models"
MB = 1_000_000
WORKER_MEMORY_GB = 0.24
KV_GB = {"tiny-llama": 0.02, "tiny-qwen3": 0.02, "tiny-llama-big": 0.045}
ROUNDS = 2
TOKENS = 24
CONCURRENT = 12
REQUEST_DEADLINE_S = 120.0
PROMPTS = ("Tell me of the sea.", "What do trees do at night?", "Name three kinds of bread.")


def tiny_placement(folders: list[Path]) -> list[ModelSpec]:
    """A placement for the tiny models of `folders` on one GPU: the first active, the others asleep."""
    return [
        ModelSpec(
            folder.name,
            str(folder),
            init_placements=[
                InitialPlacement([0], on=index == 0, max_memory_pool_size=KV_GB.get(folder.name, 0.02))
            ],
            ttft_slo_ms=2000,
            tpot_slo_ms=200,
        )
        for index, folder in enumerate(folders)
    ]


@dataclass
class Stream:
    """What one streamed answer showed to its client. Times in seconds."""

    text: str = ""
    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)


@dataclass
class Observed:
    """What was seen of one model."""

    streams: list[Stream] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    weights_bytes: int = 0
    kv_bytes: int = 0


@asynccontextmanager
async def observing(bus: Bus, seen: dict[str, Observed], loads: list[LoadReport]) -> AsyncIterator[None]:
    """Note transitions and memory from the bus, and print transitions as they happen."""

    async def on_event(message: Msg) -> None:
        event = decode(message.data, Event)
        if event.model not in seen or event.kind not in ("activated", "dozed"):
            return
        kind = {
            ("activated", "from dozing"): "wake",
            ("dozed", "from active"): "sleep",
        }.get((event.kind, event.detail), "start")
        seconds = event.seconds["total"]
        seen[event.model].seconds.setdefault(kind, []).append(seconds)
        done = {"wake": "woke", "sleep": "fell asleep", "start": "started"}[kind]
        held = (event.bytes.get("weights", 0) + event.bytes.get("kv", 0)) / MB
        click.echo(f"      ~ {event.model} {done} in {seconds * 1000:.0f} ms, holds {held:.0f} MB now")

    async def on_load(message: Msg) -> None:
        report = decode(message.data, LoadReport)
        loads.append(report)
        for model in report.models:
            if model.model in seen:
                noted = seen[model.model]
                noted.weights_bytes = max(noted.weights_bytes, model.weights_bytes)
                noted.kv_bytes = max(noted.kv_bytes, model.kv_used_bytes)

    await bus.subscribe(subjects.events(), on_event, inline=True)
    await bus.subscribe(subjects.load("*"), on_load, inline=True)
    await bus.flush()
    yield


async def stream_chat(client: httpx.AsyncClient, model: str, prompt: str, *, show: bool) -> Stream:
    """One streamed chat; printed as it comes if `show`. Raises PrismError when it is answered by an error."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    seen = Stream()
    began = last = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise PrismError(ErrorCode.INTERNAL, f"{model}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise PrismError(ErrorCode.INTERNAL, f"{model}: {chunk['error']['message']}")
            content = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if not content:
                continue
            now = time.perf_counter()
            if seen.text:
                seen.gaps.append(now - last)
            else:
                seen.ttft = now - began
                if show:
                    click.echo("      > ", nl=False)
            last = now
            seen.text += content
            if show:
                click.echo(content.replace("\n", " "), nl=False)
                sys.stdout.flush()
    if show:
        click.echo()
    return seen


async def run_demo(folder: Path) -> None:
    """The whole demonstration; raises PrismError when anything in it fails."""
    click.echo("== 1. Tiny models (random weights: they speak gibberish)")
    specs = tiny_placement(make_tiny_models(folder, report=lambda line: click.echo(f"   {line}")))
    seen = {spec.model_name: Observed() for spec in specs}
    loads: list[LoadReport] = []
    with tempfile.TemporaryDirectory(prefix="prism-demo-") as temporary:
        placement = Path(temporary) / "placement.json"
        placement.write_bytes(msgspec.json.encode(specs))
        log = Path(temporary) / "services.log"
        settings = SystemSettings(
            placement=placement,
            worker_memory_gb=WORKER_MEMORY_GB,
            store_memory_gb=1.0,
            image_dir=Path(temporary) / "images",
        )
        click.echo(f"== 2. The system: NATS and four services, {WORKER_MEMORY_GB * 1000:.0f} MB for models")
        with log.open("w") as lines:
            try:
                async with running_system(
                    settings, lambda name, line: print(name, line, file=lines)
                ) as system:
                    click.echo(f"   gateway at {system.gateway_url}, nats at {system.nats_url}")
                    async with (
                        connect_bus(system.nats_url, name="demo") as bus,
                        observing(bus, seen, loads),
                        httpx.AsyncClient(base_url=system.gateway_url, timeout=REQUEST_DEADLINE_S) as client,
                    ):
                        await _converse(client, seen)
                    click.echo("== 5. Draining")
            except BaseException:
                lines.flush()
                click.echo(log.read_text()[-4000:], err=True)
                raise
    _print_table(seen, loads)


async def _converse(client: httpx.AsyncClient, seen: dict[str, Observed]) -> None:
    click.echo("== 3. One chat after another; there is room for two of the three")
    for turn in range(ROUNDS):
        for index, model in enumerate(seen):
            prompt = PROMPTS[(turn + index) % len(PROMPTS)]
            click.echo(f"   {model}: {prompt}")
            seen[model].streams.append(await stream_chat(client, model, prompt, show=True))
    click.echo(f"== 4. {CONCURRENT} at once, to all three")
    models = [model for _ in range(CONCURRENT // len(seen)) for model in seen]
    streams = await asyncio.gather(
        *(
            stream_chat(client, model, PROMPTS[index % len(PROMPTS)], show=False)
            for index, model in enumerate(models)
        )
    )
    for model, stream in zip(models, streams, strict=True):
        seen[model].streams.append(stream)
    click.echo(f"   all {len(streams)} answered")


def _print_table(seen: dict[str, Observed], loads: list[LoadReport]) -> None:
    def milliseconds(values: list[float]) -> str:
        return f"{sorted(values)[len(values) // 2] * 1000:.0f} ms" if values else "-"

    header = ("model", "ttft", "best ttft", "inter-token", "start", "wake", "sleep", "weights", "kv")
    rows = []
    for model, noted in seen.items():
        ttfts = [stream.ttft for stream in noted.streams]
        rows.append(
            (
                model,
                milliseconds(ttfts),
                milliseconds([min(ttfts)]),
                milliseconds([gap for stream in noted.streams for gap in stream.gaps]),
                milliseconds(noted.seconds.get("start", [])),
                milliseconds(noted.seconds.get("wake", [])),
                milliseconds(noted.seconds.get("sleep", [])),
                f"{noted.weights_bytes / MB:.0f} MB",
                f"{noted.kv_bytes / MB:.0f} MB",
            )
        )
    click.echo("\nMedians, real engines on this CPU (memory: the most that was seen)")
    for line in aligned(header, rows, right=range(1, len(header))):
        click.echo(f"   {line}")
    held = max(sum(m.weights_bytes + m.kv_used_bytes for m in report.models) for report in loads)
    click.echo(f"   worker: at most {held / MB:.0f} MB of {loads[-1].memory_limit_bytes / MB:.0f} MB in use")


@click.command("demo")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=DEFAULT_FOLDER,
    help="Where the tiny models are kept.",
)
def demo_command(models: Path) -> None:
    """Serve three tiny models on a worker that holds two, show what happens, and end."""
    try:
        asyncio.run(run_demo(models))
    except PrismError as error:
        click.echo(f"prism: {error.message}", err=True)
        sys.exit(1)
