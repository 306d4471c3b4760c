"""A worker of this process with real engines, and what tests of it ask it through the bus."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from nats.aio.msg import Msg

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.errors import ErrorBody
from prism.common.messages.codec import decode
from prism.common.messages.generation import GenerateRequest, SamplingParams, TokenFrame
from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.gpu_worker.devices.cpu import CpuDevice
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.frames import frame_publisher
from prism.gpu_worker.model_instance import EngineLimits
from prism.gpu_worker.shells import ShellSource
from prism.gpu_worker.worker import Worker, WorkerIdentity, run_worker
from prism.scheduling.admission import FirstComeAdmission

DEADLINE_S = 60.0
SMALL = "tiny-llama"
KV_BYTES = 20_000_000
LIMIT_BYTES = 60_000_000


class Rig:
    """A worker, and the bus to talk to it."""

    def __init__(self, bus: Bus, worker: Worker, models: dict[str, Path]) -> None:
        self.bus = bus
        self.worker = worker
        self.models = models
        self.id = worker.identity.worker

    def facts(self, model: str) -> ModelFacts:
        size = sum(file.stat().st_size for file in self.models[model].glob("*.safetensors"))
        return ModelFacts(
            model, fingerprint="f", parameters=size // 4, checkpoint_bytes=size, context_length=2048
        )

    async def command(
        self,
        kind: CommandKind,
        model: str = SMALL,
        *,
        epoch: int = 1,
        path: Path | None = None,
        kv_bytes: int = KV_BYTES,
        drain_s: float = 20.0,
        version: str = "",
    ) -> CommandOutcome:
        command = Command(
            kind=kind,
            epoch=epoch,
            spec=ModelSpec(model, str(path or self.models[model])),
            facts=msgspec.structs.replace(self.facts(model), version=version),
            deadline_s=DEADLINE_S,
            drain_s=drain_s,
            kv_bytes=kv_bytes,
        )
        return await self.bus.request(
            subjects.command(self.id), command, CommandOutcome, timeout_s=DEADLINE_S
        )

    def load(self, model: str = SMALL) -> ModelLoad:
        return next(load for load in self.worker.load_report().models if load.model == model)

    async def until_state(self, state: ModelState, model: str = SMALL) -> LoadReport:
        """Wait for a load report in which `model` is in `state`."""
        return await self._until(
            lambda report: any(load.model == model and load.state is state for load in report.models)
        )

    async def until_commanded(self, models: list[str]) -> LoadReport:
        """Wait for a load report that says that commands for exactly these models are here."""
        return await self._until(lambda report: report.commanded == models)

    async def _until(self, true: Callable[[LoadReport], bool]) -> LoadReport:
        found: asyncio.Future[LoadReport] = asyncio.get_running_loop().create_future()

        async def look(message: Msg) -> None:
            report = decode(message.data, LoadReport)
            if true(report) and not found.done():
                found.set_result(report)

        subscription = await self.bus.subscribe(subjects.load(self.id), look, inline=True)
        try:
            return await asyncio.wait_for(found, DEADLINE_S)
        finally:
            await subscription.unsubscribe()


class Frames:
    """The frames of one request, in order."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[TokenFrame | None] = asyncio.Queue()

    async def next(self) -> TokenFrame | None:
        """The next frame; None when nobody took the request."""
        return await asyncio.wait_for(self.queue.get(), DEADLINE_S)

    async def all(self) -> list[TokenFrame]:
        """Frames up to and with the last."""
        frames: list[TokenFrame] = []
        while not frames or (frames[-1].finish is None and frames[-1].error is None):
            frame = await self.next()
            assert frame is not None
            frames.append(frame)
        assert [frame.seq for frame in frames] == list(range(len(frames)))
        return frames


async def send(rig: Rig, rid: str, ids: list[int], tokens: int, **options: object) -> Frames:
    frames = Frames()

    async def on_frame(message: Msg) -> None:
        frames.queue.put_nowait(decode(message.data, TokenFrame) if message.data else None)

    request = GenerateRequest(
        rid=rid.ljust(32, "0"),
        model=SMALL,
        input_ids=ids,
        sampling=SamplingParams(tokens, temperature=0, ignore_eos=True),
        deadline_s=DEADLINE_S,
    )
    request = msgspec.structs.replace(request, **options)
    reply = subjects.reply("test", request.rid)
    await rig.bus.subscribe(reply, on_frame, inline=True)
    await rig.bus.publish(subjects.request(SMALL, rig.id), request, reply=reply)
    return frames


async def last_error(frames: Frames) -> ErrorBody:
    """The error that ends a request which has begun."""
    while True:
        frame = await frames.next()
        assert frame is not None
        assert frame.finish is None
        if frame.error is not None:
            return frame.error


def tokens_of(frames: list[TokenFrame]) -> list[int]:
    return [token for frame in frames for token in frame.tokens]


@asynccontextmanager
async def store_process(nats: NatsServer, folder: Path, memory_gb: float = 1.0) -> AsyncIterator[Path]:
    """A real model store; yields its socket once it listens."""
    socket = folder / "store.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "prism.model_store", "--nats", nats.url, "--socket", str(socket),
        "--image-dir", str(folder / "images"), "--memory-gb", str(memory_gb),
        env={**os.environ, "PRISM_PARENT_PID": str(os.getpid())},
    )  # fmt: skip
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not socket.exists():
                assert process.returncode is None
                await asyncio.sleep(0.02)
        yield socket
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE_S)


@asynccontextmanager
async def worker_rig(
    nats: NatsServer, store: Path, shells: ShellSource, models: dict[str, Path], *, stall_s: float = 30.0
) -> AsyncIterator[Rig]:
    """A worker on the CPU."""
    async with device_rig(nats, store, CpuDevice(shells), models, stall_s=stall_s) as rig:
        yield rig


@asynccontextmanager
async def device_rig(
    nats: NatsServer, store: Path, device: Device, models: dict[str, Path], *, stall_s: float = 30.0
) -> AsyncIterator[Rig]:
    """A worker on `device`."""
    identity = WorkerIdentity(f"worker-{os.urandom(3).hex()}", "node")
    async with (
        connect_bus(nats.url, name="worker test") as bus,
        frame_publisher(bus) as publisher,
        run_worker(
            identity,
            bus,
            device,
            publisher,
            drain_s=5.0,
            admission=FirstComeAdmission(),
            memory_limit_bytes=LIMIT_BYTES,
            store_socket=str(store),
            limits=EngineLimits(4, 256, stall_s=stall_s),
        ) as worker,
    ):
        yield Rig(bus, worker, models)
