"""The stack of deploy/compose as a user runs it: up, scaled, struck, down."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
from tests.compose.docker_engine import Engine
from tests.compose.images import TAG
from tests.compose.shell import CommandFailed

PROJECT = "prism-compose-test"
FIRST_PORT = 18000
LAST_PORT = 30000
GATEWAY_PORTS = 10
UP_DEADLINE_S = 240.0
SCALE_DEADLINE_S = 180.0
DOWN_DEADLINE_S = 180.0
KILL_DEADLINE_S = 30.0
LOG_DEADLINE_S = 60.0
LOG_LINES = 4000
LOOK_S = 0.5
PROBE_DEADLINE_S = 3.0
_OF_PROJECT = ("--filter", f"label=com.docker.compose.project={PROJECT}")


class NotThere(Exception):
    """The stack did not come to where it should be before a deadline; the message says what is missing."""


@dataclass(frozen=True)
class Container:
    """A container of the stack. `restarts` counts those by the engine, `ports` are on the host."""

    identity: str
    name: str
    service: str
    status: str
    pid: int
    restarts: int
    ports: list[int]


@dataclass
class Stack:
    """The stack of one engine, from the compose file in `folder` with the `settings` of a file.

    `gateways` is kept up to date while it is `followed`, as a load balancer's list is.
    """

    engine: Engine
    folder: Path
    settings: Path
    nats_url: str
    services_log: TextIO
    gateways: list[str] = field(default_factory=list)

    async def up(self) -> None:
        """Start one of each service. Raises CommandFailed."""
        await self._compose("up", "--detach", "--no-build", timeout_s=UP_DEADLINE_S)
        await self.look()

    async def scale(self, counts: Mapping[str, int]) -> None:
        """Have that many of each service; those that go finish what they have begun. Raises CommandFailed."""
        scaled = [word for service, count in counts.items() for word in ("--scale", f"{service}={count}")]
        await self._compose(
            *("up", "--detach", "--no-build", "--no-recreate", "--no-deps", *scaled, *counts),
            timeout_s=SCALE_DEADLINE_S,
        )
        await self.look()

    async def kill(self, container: Container) -> None:
        """End the container's main process as a crash would, so that its restart policy applies; to the
        engine's own `kill` it does not. Raises CommandFailed."""
        await self.engine.docker(
            *("run", "--rm", "--pid", "host", "--user", "0", "--network", "none", "--entrypoint", "sh"),
            *(f"prism/nats:{TAG}", "-c", f"kill -9 {container.pid}"),
            timeout_s=KILL_DEADLINE_S,
        )

    async def restarted(self, killed: Container, deadline_s: float) -> None:
        """Wait until the engine has started `killed` again. Raises NotThere."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            same = [
                each for each in await self.containers(killed.service) if each.identity == killed.identity
            ]
            if any(each.status == "running" and each.restarts > killed.restarts for each in same):
                return
            await asyncio.sleep(LOOK_S)
        raise NotThere(f"{killed.name} was not started again within {deadline_s:.0f} s")

    async def down(self) -> None:
        """End everything, with all volumes. Raises CommandFailed."""
        await self._compose("down", "--volumes", "--remove-orphans", timeout_s=DOWN_DEADLINE_S)

    async def write_logs(self, when: str) -> None:
        """Add to `services_log` what the services have said so far. Raises CommandFailed."""
        told = await self._compose(
            "logs", "--no-color", "--timestamps", f"--tail={LOG_LINES}", timeout_s=LOG_DEADLINE_S
        )
        self.services_log.write(f"=== {when}\n{told}")

    async def containers(self, service: str | None = None) -> list[Container]:
        """Those of one service or of all, stopped ones too. Raises CommandFailed."""
        which = () if service is None else ("--filter", f"label=com.docker.compose.service={service}")
        identities = (
            await self.engine.docker("ps", "--all", "--quiet", "--no-trunc", *_OF_PROJECT, *which)
        ).split()
        if not identities:
            return []
        try:
            inspected = await self.engine.docker("inspect", "--type", "container", *identities)
        except CommandFailed:
            # One has gone in between.
            return await self.containers(service)
        return sorted((_container(each) for each in json.loads(inspected)), key=lambda each: each.name)

    async def look(self) -> None:
        """See where gateways listen now. Raises CommandFailed."""
        found = await self.containers("gateway")
        ports = sorted(port for each in found if each.status == "running" for port in each.ports)
        # While there is none, clients try where the last ones were.
        self.gateways = [f"http://127.0.0.1:{port}" for port in ports] or self.gateways

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Keep `gateways` up to date while the block runs."""

        async def follow() -> None:
            while True:
                with suppress(CommandFailed):
                    await self.look()
                await asyncio.sleep(LOOK_S)

        task = asyncio.create_task(follow(), name="follow gateways")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def ready(self, gateways: int, deadline_s: float) -> None:
        """Wait until that many gateways say that they are ready. Raises NotThere."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            await self.look()
            answers = await asyncio.gather(*(_is_ready(url) for url in self.gateways))
            if answers == [True] * gateways:
                return
            await asyncio.sleep(LOOK_S)
        raise NotThere(f"not {gateways} gateways ready after {deadline_s:.0f} s: {self.gateways}")

    async def _compose(self, *arguments: str, timeout_s: float) -> str:
        beginning = (*self.engine.compose, "--env-file", str(self.settings), "--project-name", PROJECT)
        return await self.engine.shell.run(*beginning, *arguments, timeout_s=timeout_s, folder=self.folder)


@contextmanager
def settings_file(folder: Path) -> Iterator[tuple[Path, str]]:
    """The stack's settings as a file in `folder`, on ports of loopback that are free, and the bus's URL."""
    gateways = free_ports(GATEWAY_PORTS, FIRST_PORT)
    bus = free_ports(2, gateways.stop)
    settings = folder / "compose-test.env"
    settings.write_text(
        f"COMPOSE_PROJECT_NAME={PROJECT}\n"
        f"PRISM_TAG={TAG}\n"
        f"PRISM_PORTS=127.0.0.1:{gateways[0]}-{gateways[-1]}\n"
        f"PRISM_NATS_PORT={bus[0]}\n"
        f"PRISM_NATS_MONITOR_PORT={bus[1]}\n"
    )
    try:
        yield settings, f"nats://127.0.0.1:{bus[0]}"
    finally:
        settings.unlink()


def free_ports(count: int, first: int) -> range:
    """`count` ports in a row, from `first` on, on which nobody listens. Raises NotThere."""
    for start in range(first, LAST_PORT, count):
        if all(_is_free(port) for port in range(start, start + count)):
            return range(start, start + count)
    raise NotThere(f"no {count} free ports in a row between {first} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


async def _is_ready(url: str) -> bool:
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PROBE_DEADLINE_S) as client:
            return (await client.get("/readyz")).status_code == 200
    except httpx.HTTPError:
        return False


def _container(told: dict[str, Any]) -> Container:
    """A container as `docker inspect` tells of it."""
    bindings = told["NetworkSettings"]["Ports"] or {}
    ports = {int(each["HostPort"]) for bound in bindings.values() for each in bound or []}
    return Container(
        identity=told["Id"],
        name=told["Name"].lstrip("/"),
        service=told["Config"]["Labels"]["com.docker.compose.service"],
        status=told["State"]["Status"],
        pid=told["State"]["Pid"],
        restarts=told["RestartCount"],
        ports=sorted(ports),
    )
