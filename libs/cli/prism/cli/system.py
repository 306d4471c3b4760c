"""The whole system as processes of this machine: nats-server and one process a service, started and ended
together. `prism up`, `prism demo` and the end-to-end tests all stand on it."""

import asyncio
import itertools
import logging
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from prism.cli.nats_server import (
    ANY_PORT,
    START_DEADLINE_S,
    listening_url,
    nats_command,
    nats_environment,
    not_up,
    write_nats_config,
)
from prism.cli.scratch_folder import ScratchFolder, scratch_folder
from prism.cli.service_process import ServiceProcess
from prism.common.errors import ErrorCode, PrismError
from prism.common.modes import DEFAULT_MODE
from prism.common.placement_file import read_placement_file
from prism.common.process import die_with_parent

log = logging.getLogger(__name__)

READY_DEADLINE_S = 120.0
FOLDERS_READ_S = 20.0
ABANDON_DEADLINE_S = 2.0
NATS_LOOK_S = 0.01
NATS = "nats"
STOP_ORDER = ("gateway", "global_scheduler", "gpu_worker", "model_store", NATS)

_READY = re.compile(r"gateway ready at (http://\S+)")


@dataclass(frozen=True)
class SystemSettings:
    """What to run. Counts are processes of each service; a port of 0 lets the kernel choose, further gateways
    take the ports after it. Without `nats_url` a NATS server of its own listens on `nats_port`. Each
    worker counts as one GPU of the cluster and uses one of the stores; of several on `cuda` worker i uses GPU
    i - 1. Without `worker_memory_gb` a worker uses what its device says."""

    placement: Path
    nats_url: str | None = None
    nats_port: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    worker_memory_gb: float | None = None
    store_memory_gb: float | None = None
    image_dir: Path | None = None
    mode: str = DEFAULT_MODE
    policy: str | None = None
    device: str = "cpu"
    log_level: str = "INFO"
    log_format: str = "text"
    drain_s: float = 30.0
    gateways: int = 1
    schedulers: int = 1
    workers: int = 1
    stores: int = 1
    environment: dict[str, str] = field(default_factory=dict)


class RunningSystem:
    """The services of a running system: their processes by name, and where the gateways listen. A NATS server
    of its own is one of them."""

    def __init__(
        self, settings: SystemSettings, scratch: ScratchFolder, on_line: Callable[[str, str], None]
    ) -> None:
        self.nats_url = settings.nats_url or ""
        self.folder = scratch.path
        self.services: dict[str, ServiceProcess] = {}
        self.gateway_urls: dict[str, str] = {}
        self._settings = settings
        self._users_fd = scratch.users_fd
        self._on_line = on_line
        self._ready: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._came_up = False

    @property
    def gateway_url(self) -> str:
        """Where the first gateway listens."""
        return next(iter(self.gateway_urls.values()))

    def of(self, kind: str) -> list[ServiceProcess]:
        """The processes of one service."""
        return [service for service in self.services.values() if service.kind == kind]

    async def add(self, kind: str) -> ServiceProcess:
        """Start one more process of a service; a gateway is ready to serve when this returns.

        Raises PrismError when it does not come up.
        """
        service = self._start_next(kind)
        await service.start()
        if kind == "gateway":
            await self._wait_for_gateways()
        return service

    async def remove(self, name: str) -> None:
        """Drain one process and end it for good."""
        service = self.services.pop(name)
        self._changed.set()
        self.gateway_urls.pop(name, None)
        await service.stop()

    async def start(self) -> None:
        """Start what the settings ask for. Raises PrismError when it does not come up."""
        if not self.nats_url:
            await self._start_nats()
        counts = {
            "model_store": self._settings.stores,
            "gpu_worker": self._settings.workers,
            "global_scheduler": self._settings.schedulers,
            "gateway": self._settings.gateways,
        }
        for kind, count in counts.items():
            for _ in range(count):
                await self._start_next(kind).start()
        await self._wait_for_gateways()
        self._came_up = True

    async def stop(self) -> None:
        """Drain and end everything, gateways first: what they have begun needs the others. What never came up
        has begun nothing: it ends all at once, and soon."""
        if not self._came_up:
            services = [service for service in self.services.values() if service.kind != NATS]
            await asyncio.gather(*(service.stop(ABANDON_DEADLINE_S) for service in services))
        for kind in STOP_ORDER:
            await asyncio.gather(*(service.stop() for service in self.of(kind)))

    def kill(self) -> None:
        """End everything now."""
        for service in self.services.values():
            service.kill()

    async def first_failure(self) -> str:
        """Wait until a service turns out not to run at all; say which and how."""
        while True:
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait(), name="services changed")
            failures = [service.failed for service in self.services.values()]
            waited: list[asyncio.Future[Any]] = [changed, *failures]
            try:
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            for failure in failures:
                if failure.done():
                    return failure.result()

    def _start_next(self, kind: str) -> ServiceProcess:
        taken = {service.name for service in self.of(kind)}
        number = next(number for number in itertools.count(1) if _name(kind, number) not in taken)
        name = _name(kind, number)
        stores = [store.name for store in self.of("model_store")]
        arguments = service_arguments(self._settings, self.nats_url, self.folder, kind, number, stores)
        command = [sys.executable, "-m", f"prism.{kind}", *arguments]
        service = ServiceProcess(
            kind, name, command, self._settings.environment, self._watch_line, [self._users_fd]
        )
        self._ready[name] = asyncio.Event()
        self._know(service)
        return service

    def _know(self, service: ServiceProcess) -> None:
        self.services[service.name] = service
        self._changed.set()

    async def _start_nats(self) -> None:
        folder = self.folder / NATS
        write_nats_config(folder, port=self._settings.nats_port or ANY_PORT)
        service = ServiceProcess(
            NATS,
            NATS,
            nats_command(folder),
            nats_environment(),
            self._watch_line,
            [self._users_fd],
            die_with_parent,
        )
        self._know(service)
        await service.start()
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                while not self.nats_url:
                    if service.failed.done():
                        raise not_up(folder)
                    assert service.process is not None
                    self.nats_url = listening_url(folder, service.process.pid)
                    await asyncio.sleep(NATS_LOOK_S)
        except TimeoutError as error:
            raise not_up(folder) from error
        # Started again, it must be where the others look for it.
        write_nats_config(folder, port=urlsplit(self.nats_url).port or ANY_PORT)

    def _watch_line(self, name: str, line: str) -> None:
        found = _READY.search(line)
        if found and name in self.services:
            self.gateway_urls[name] = found.group(1)
            self._ready[name].set()
        self._on_line(name, line)

    async def _wait_for_gateways(self) -> None:
        models = {spec.model_name for spec in read_placement_file(self._settings.placement)}
        failure = asyncio.create_task(self.first_failure(), name="first failure")
        try:
            async with asyncio.timeout(READY_DEADLINE_S):
                for service in self.of("gateway"):
                    listening = asyncio.create_task(self._ready[service.name].wait(), name="listening")
                    await asyncio.wait([listening, failure], return_when=asyncio.FIRST_COMPLETED)
                    listening.cancel()
                    if failure.done():
                        raise PrismError(ErrorCode.INTERNAL, failure.result())
                    await wait_until_served(self.gateway_urls[service.name], models, failure)
        except TimeoutError as error:
            raise PrismError(
                ErrorCode.INTERNAL,
                f"the system is not ready after {READY_DEADLINE_S:.0f} s; see its log above",
            ) from error
        finally:
            failure.cancel()
            await asyncio.gather(failure, return_exceptions=True)


@asynccontextmanager
async def running_system(
    settings: SystemSettings, on_line: Callable[[str, str], None]
) -> AsyncIterator[RunningSystem]:
    """Start everything, yield when the gateways answer for all models, drain and end everything.

    `on_line(service, line)` gets every log line. Raises PrismError when a service does not come up.
    """
    with scratch_folder("prism-") as scratch:
        system = RunningSystem(settings, scratch, on_line)
        try:
            await system.start()
            yield system
        finally:
            await system.stop()


def _name(kind: str, number: int) -> str:
    return kind if number == 1 else f"{kind}-{number}"


def service_arguments(
    settings: SystemSettings, nats_url: str, folder: Path, kind: str, number: int, stores: Sequence[str]
) -> list[str]:
    """The command line of process `number` of a service; a worker takes its share of the `stores`."""
    common = ["--nats", nats_url, "--log-level", settings.log_level, "--log-format", settings.log_format]
    match kind:
        case "model_store":
            store = [*common, "--socket", _socket(folder, _name(kind, number))]
            if settings.image_dir is not None:
                store += ["--image-dir", str(settings.image_dir)]
            if settings.store_memory_gb is not None:
                store += ["--memory-gb", str(settings.store_memory_gb)]
            return store
        case "gpu_worker":
            worker = [*common, "--device", settings.device, "--first-gpu-id", str(number - 1)]
            worker += ["--store-socket", _socket(folder, stores[(number - 1) % len(stores)])]
            if settings.device == "cuda" and max(settings.workers, number) > 1:
                worker += ["--gpu", str(number - 1)]
            if settings.worker_memory_gb is not None:
                worker += ["--worker-memory-gb", str(settings.worker_memory_gb)]
            return [*worker, "--mode", settings.mode, "--drain-s", str(settings.drain_s)]
        case "global_scheduler":
            scheduler = [*common, "--placement", str(settings.placement), "--mode", settings.mode]
            return [*scheduler, "--policy", settings.policy] if settings.policy is not None else scheduler
        case _:
            port = settings.port + number - 1 if settings.port else 0
            gateway = [*common, "--host", settings.host, "--port", str(port)]
            return [*gateway, "--drain-s", str(settings.drain_s)]


def _socket(folder: Path, store: str) -> str:
    return str(folder / f"{store}.sock")


async def wait_until_served(url: str, models: set[str], failure: "asyncio.Future[Any]") -> None:
    """Wait until the gateway at `url` is ready and knows `models`: the scheduler registers them meanwhile.

    For FOLDERS_READ_S also until the store has read each model's folder, or said why it can't; one that is
    fetched from a hub takes longer, and is not waited for. The caller bounds the wait. Raises PrismError with
    what `failure` says once that is done.
    """
    listed_at: float | None = None
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        while True:
            try:
                if (await client.get("/readyz")).status_code == 200:
                    entries = (await client.get("/v1/models")).json()["data"]
                    listed = {entry["id"]: entry for entry in entries}
                    if models <= listed.keys():
                        listed_at = listed_at or time.monotonic()
                        unread = [name for name in models if not _is_read(listed[name])]
                        if not unread or time.monotonic() - listed_at > FOLDERS_READ_S:
                            return
            except httpx.HTTPError as error:
                log.debug("gateway not there yet: %s", error)
            if failure.done():
                raise PrismError(ErrorCode.INTERNAL, str(failure.result()))
            await asyncio.sleep(0.1)


def _is_read(entry: dict[str, Any]) -> bool:
    """Whether an entry of /v1/models says what its folder holds, or that it is no good."""
    return entry.get("context_length") is not None or entry.get("state") == "failed"
