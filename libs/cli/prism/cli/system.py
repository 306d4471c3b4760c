"""The whole system as processes of this machine: nats-server and one process a service, started and ended
together. `prism up`, `prism demo` and the end-to-end tests all stand on it."""

import asyncio
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from prism.cli.nats_server import nats_server
from prism.common.errors import ErrorCode, PrismError

log = logging.getLogger(__name__)

READY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 45.0
KILL_DEADLINE_S = 5.0
RESTART_DELAY_S = 1.0
EARLY_S = 3.0
LONGEST_LINE_BYTES = 1 << 20
STOP_ORDER = ("gateway", "global_scheduler", "gpu_worker", "model_store")

_READY = re.compile(r"gateway ready at (http://\S+)")


@dataclass(frozen=True)
class SystemSettings:
    """What to run. Counts are processes of each service; a port of 0 lets the kernel choose."""

    placement: Path
    nats_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    worker_memory_gb: float = 4.0
    store_memory_gb: float | None = None
    image_dir: Path | None = None
    mode: str = "full"
    policy: str = "lru"
    device: str = "cpu"
    log_level: str = "INFO"
    drain_s: float = 30.0
    environment: dict[str, str] = field(default_factory=dict)


class ServiceProcess:
    """One service: started again when it dies unasked, its output handed on line by line."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: dict[str, str],
        on_line: Callable[[str, str], None],
    ) -> None:
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._arguments = arguments
        self._environment = environment
        self._on_line = on_line
        self._stopping = False
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process, and keep it running from now on."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def _spawn(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"prism.{self.name}",
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **self._environment, "PRISM_PARENT_PID": str(os.getpid())},
            start_new_session=True,
            limit=LONGEST_LINE_BYTES,
        )

    async def _keep(self) -> None:
        while True:
            assert self.process is not None
            began = time.monotonic()
            await self._read(self.process)
            status = await self.process.wait()
            if self._stopping:
                return
            if time.monotonic() - began < EARLY_S and status > 0:
                if not self.failed.done():
                    self.failed.set_result(
                        f"{self.name} ended at once with status {status}; see its log above"
                    )
                return
            self._on_line(self.name, f"ended with status {status}, started again")
            await asyncio.sleep(RESTART_DELAY_S)
            if self._stopping:
                return
            await self._spawn()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                # Longer than the limit: readline has dropped it, and goes on behind it.
                line = b"(a line too long to show)\n"
            if not line:
                return
            self._on_line(self.name, line.decode(errors="replace").rstrip())

    async def stop(self) -> None:
        """Drain and end; killed when it takes longer than it may."""
        self._stopping = True
        process = self.process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_DEADLINE_S):
                    await process.wait()
            except TimeoutError:
                self._on_line(self.name, f"did not end within {STOP_DEADLINE_S:.0f} s, killed")
                self.kill()
        if self._keeper is not None:
            try:
                async with asyncio.timeout(KILL_DEADLINE_S):
                    await self._keeper
            except TimeoutError:
                self._on_line(self.name, "left a child that holds its output open")

    def kill(self) -> None:
        """End it now."""
        self._stopping = True
        if self.process is not None and self.process.returncode is None:
            self.process.kill()


class RunningSystem:
    """The services of a running system: where they listen, and their processes."""

    def __init__(self, nats_url: str, folder: Path) -> None:
        self.nats_url = nats_url
        self.folder = folder
        self.gateway_url = ""
        self.services: dict[str, ServiceProcess] = {}

    async def first_failure(self) -> str:
        """Wait until a service turns out not to run at all; say which and how."""
        done, _ = await asyncio.wait(
            [service.failed for service in self.services.values()], return_when=asyncio.FIRST_COMPLETED
        )
        return done.pop().result()

    def kill(self) -> None:
        """End everything now."""
        for service in self.services.values():
            service.kill()


@asynccontextmanager
async def running_system(
    settings: SystemSettings, on_line: Callable[[str, str], None]
) -> AsyncIterator[RunningSystem]:
    """Start everything, yield when the gateway answers, drain and end everything.

    `on_line(service, line)` gets every log line. Raises PrismError when a service does not come up.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prism-")))
        url = settings.nats_url
        if url is None:
            url = stack.enter_context(nats_server(folder / "nats")).url
        system = RunningSystem(url, folder)
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def watch_line(service: str, line: str) -> None:
            found = _READY.search(line)
            if found:
                system.gateway_url = found.group(1)
                if not ready.done():
                    ready.set_result(found.group(1))
            on_line(service, line)

        for name, arguments in _services(settings, url, folder).items():
            service = ServiceProcess(name, arguments, settings.environment, watch_line)
            system.services[name] = service
        try:
            for service in system.services.values():
                await service.start()
            await _wait_until_ready(system, ready)
            yield system
        finally:
            for name in STOP_ORDER:
                await system.services[name].stop()


def _services(settings: SystemSettings, nats_url: str, folder: Path) -> dict[str, list[str]]:
    common = ["--nats", nats_url, "--log-level", settings.log_level]
    socket = str(folder / "store.sock")
    store = [*common, "--socket", socket]
    if settings.image_dir is not None:
        store += ["--image-dir", str(settings.image_dir)]
    if settings.store_memory_gb is not None:
        store += ["--memory-gb", str(settings.store_memory_gb)]
    return {
        "model_store": store,
        "gpu_worker": [
            *common,
            "--device",
            settings.device,
            "--store-socket",
            socket,
            "--worker-memory-gb",
            str(settings.worker_memory_gb),
            "--drain-s",
            str(settings.drain_s),
        ],
        "global_scheduler": [
            *common,
            "--placement",
            str(settings.placement),
            "--mode",
            settings.mode,
            "--policy",
            settings.policy,
        ],
        "gateway": [
            *common,
            "--host",
            settings.host,
            "--port",
            str(settings.port),
            "--drain-s",
            str(settings.drain_s),
        ],
    }


async def _wait_until_ready(system: RunningSystem, ready: "asyncio.Future[str]") -> None:
    failure = asyncio.create_task(system.first_failure(), name="first failure")
    try:
        async with asyncio.timeout(READY_DEADLINE_S):
            await asyncio.wait([ready, failure], return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                raise PrismError(ErrorCode.INTERNAL, failure.result())
            await _wait_for_readyz(ready.result(), failure)
    except TimeoutError as error:
        raise PrismError(
            ErrorCode.INTERNAL, f"the system is not ready after {READY_DEADLINE_S:.0f} s; see its log above"
        ) from error
    finally:
        failure.cancel()
        await asyncio.gather(failure, return_exceptions=True)


async def _wait_for_readyz(url: str, failure: "asyncio.Task[str]") -> None:
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        while True:
            try:
                if (await client.get("/readyz")).status_code == 200:
                    return
            except httpx.HTTPError as error:
                log.debug("gateway not there yet: %s", error)
            if failure.done():
                raise PrismError(ErrorCode.INTERNAL, failure.result())
            await asyncio.sleep(0.1)
