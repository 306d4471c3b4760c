"""A running system without a scheduler, whose worker is told what to do by the benchmark itself.

So a figure runs from the command on the bus to the first byte out of the gateway, with no decision in it.
"""

import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from msgspec import convert
from nats.aio.msg import Msg

from prism.cli.system import SystemSettings, running_system
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.common.mirror import mirror_bucket
from prism.scheduling.memory import kv_reservation

COMMAND_DEADLINE_S = 400.0
ANSWER_DEADLINE_S = 120.0
IMAGE_DEADLINE_S = 300.0
DISK_DEADLINE_S = 60.0
PIN_DEADLINE_S = 60.0
POLL_S = 0.2
PINNED = "image pinned"
"""What an engine logs once all of its image is."""
EPOCH = 1


@dataclass
class Answer:
    """A streamed completion: when its first byte came (monotonic seconds), and what it said."""

    first_byte_at: float = 0.0
    text: str = ""
    error: str = ""


@dataclass
class CommandedSystem:
    """The bus, the gateway and the worker of a running system.

    `pinned` are the log lines of engines whose image is. `requested_at` and `framed_at` are when the last
    request and the frames of its answer were on the bus, in seconds on the monotonic clock.
    """

    bus: Bus
    http: httpx.AsyncClient
    specs: dict[str, ModelSpec]
    facts: dict[str, ModelFacts]
    image_dir: Path
    pinned: list[str]
    worker: str = ""
    ready: bool = False
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    requested_at: float = 0.0
    framed_at: list[float] = field(default_factory=list)

    async def command(self, kind: CommandKind, model: str) -> CommandOutcome:
        """Tell the worker, and wait for what came of it. Raises PrismError with its error."""
        spec, facts = self.specs[model], self.facts[model]
        command = Command(
            kind,
            EPOCH,
            spec,
            facts,
            deadline_s=COMMAND_DEADLINE_S,
            drain_s=10.0,
            kv_bytes=kv_reservation(spec, facts, None),
        )
        subject = subjects.command(self.worker)
        outcome = await self.bus.request(subject, command, CommandOutcome, timeout_s=COMMAND_DEADLINE_S + 10)
        if outcome.error is not None:
            raise PrismError.from_body(outcome.error)
        return outcome

    async def doze_once_imaged(self, model: str) -> CommandOutcome:
        """Have a model doze that was just built: as soon as the store has its image. Raises PrismError."""
        deadline = time.monotonic() + IMAGE_DEADLINE_S
        while True:
            try:
                return await self.command(CommandKind.DOZE, model)
            except PrismError as error:
                # The worker has waited by then: no need to wait here.
                if error.code is not ErrorCode.STORE_UNAVAILABLE or time.monotonic() > deadline:
                    raise

    def disk_has_room_for(self, nbytes: int) -> bool:
        """Whether the store can write so many bytes to its disk."""
        return shutil.disk_usage(self.image_dir.parent).free > nbytes

    @property
    def images_on_disk(self) -> int:
        """How many images the store has written."""
        # A folder gets its name once the image in it is whole.
        return len(list(self.image_dir.glob("*/[!.]*/manifest.json")))

    async def images_written(self, count: int) -> bool:
        """Wait until the store has written so many images to disk: a disk that is written to slows copies
        down. False when that takes longer than DISK_DEADLINE_S."""
        return await _comes_true(lambda: self.images_on_disk >= count, DISK_DEADLINE_S)

    async def until_pinned(self, count: int) -> bool:
        """Wait until so many images are pinned: a wake before that is slower. False when that takes longer
        than PIN_DEADLINE_S."""
        return await _comes_true(lambda: len(self.pinned) >= count, PIN_DEADLINE_S)

    async def complete(self, model: str, prompt: list[int], tokens: int) -> Answer:
        """A greedy streamed completion of token ids."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        answer = Answer()
        request = self.http.stream("POST", "/v1/completions", json=body, timeout=ANSWER_DEADLINE_S)
        async with request as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    answer.error += line
                    continue
                if not answer.first_byte_at:
                    answer.first_byte_at = time.monotonic()
                if line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    answer.error += json.dumps(event["error"]) if "error" in event else ""
                    answer.text += "".join(choice["text"] for choice in event.get("choices", []))
        return answer

    async def shell_is_warm(self) -> None:
        """Wait until the worker has a shell to start a model in."""
        # What was reported before a shell was taken says nothing.
        self.ready = False
        async with asyncio.timeout(COMMAND_DEADLINE_S):
            while not self.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def parked(self, count: int) -> None:
        """Wait until the gateway has so many requests parked."""
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            while True:
                metrics = (await self.http.get("/metrics")).text.splitlines()
                lines = [line for line in metrics if line.startswith("prism_gateway_parked")]
                if sum(float(line.rsplit(" ", 1)[1]) for line in lines) >= count:
                    return
                await asyncio.sleep(0.005)


async def _comes_true(condition: Callable[[], bool], deadline_s: float) -> bool:
    """Wait until `condition` holds; False when that takes longer than `deadline_s` seconds."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True


def _worker_gpus(device: str, count: int) -> dict[str, str]:
    """The variables that give a worker several GPUs."""
    return {"PRISM_GPU": ",".join(map(str, range(count)))} if device == "cuda" and count > 1 else {}


@asynccontextmanager
async def commanded_system(
    models: dict[str, Path],
    folder: Path,
    *,
    kv_gb: float,
    log: Path,
    device: str = "cuda",
    worker_memory_gb: float | None = None,
    store_memory_gb: float = 100.0,
    image_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    tp_size: int = 1,
    workers: int = 1,
) -> AsyncIterator[CommandedSystem]:
    """NATS, store, worker and gateway; `models` registered, none of them started. Of several `workers`, each
    on a GPU, that with the GPU id 0 is commanded.

    Services get `environment` on top of ours. Memory in 10^9 bytes; without `worker_memory_gb` the device's
    own. Each model is spread over `tp_size` GPUs, from the first on, and the worker has as many.
    """
    placement = folder / "placement.json"
    placement.write_text("[]")
    images = image_dir or folder / "images"
    settings = SystemSettings(
        placement=placement,
        store_memory_gb=store_memory_gb,
        worker_memory_gb=worker_memory_gb,
        image_dir=images,
        device=device,
        workers=workers,
        schedulers=0,
        log_level=os.environ.get("PRISM_LOG_LEVEL", "INFO"),
        environment={**_worker_gpus(device, tp_size), **(environment or {})},
    )
    place = [{"gpu_ids": list(range(tp_size)), "on": False, "max_memory_pool_size": kv_gb}]
    with log.open("w", buffering=1) as lines:
        pinned: list[str] = []

        def told(service: str, line: str) -> None:
            print(service, line, file=lines)
            if PINNED in line:
                pinned.append(line)

        async with (
            running_system(settings, told) as system,
            connect_bus(system.nats_url, name="bench") as bus,
            httpx.AsyncClient(base_url=system.gateway_url) as http,
        ):
            bucket = await bus.bucket(subjects.BUCKET_MODELS)
            specs = {
                name: convert(
                    {
                        "model_name": name,
                        "model_path": str(path),
                        "init_placements": place,
                        "tp_size": tp_size,
                    },
                    ModelSpec,
                )
                for name, path in models.items()
            }
            for name, spec in specs.items():
                await bucket.put(subjects.spec_key(name), encode(spec))
            commanded = CommandedSystem(bus, http, specs, {}, images, pinned)

            async def on_load(message: Msg) -> None:
                report = decode(message.data, LoadReport)
                if 0 not in report.gpu_ids:
                    return
                commanded.ready = report.ready
                if report.ready:
                    commanded.worker = report.worker
                    commanded.reported.set()

            async def on_request(_: Msg) -> None:
                commanded.requested_at = time.monotonic()
                commanded.framed_at = []

            async def on_frame(_: Msg) -> None:
                commanded.framed_at.append(time.monotonic())

            await bus.subscribe(subjects.load("*"), on_load, inline=True)
            await bus.subscribe(subjects.request("x", "*").replace(".x.", ".*."), on_request, inline=True)
            await bus.subscribe(subjects.replies("*"), on_frame, inline=True)
            async with (
                mirror_bucket(bus, subjects.BUCKET_MODELS, ModelFacts, pattern="facts.*") as facts,
                asyncio.timeout(COMMAND_DEADLINE_S),
            ):
                await commanded.reported.wait()
                while len(facts.values) < len(models):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                commanded.facts = {fact.model: fact for fact in facts.values.values()}
            yield commanded
