"""The health command, as a container runs it: real services on a real NATS server, and an exit status."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from prism.cli.nats_server import NatsServer, find_nats_server
from prism.common import subjects
from prism.common.bus import Bus
from prism.common.health import SERVICES
from prism.common.messages.codec import encode
from prism.common.messages.models import ModelSpec
from prism.common.micro import micro_service

pytestmark = pytest.mark.core

DEADLINE_S = 60.0
HEAVY = ("nats", "aiohttp", "asyncio", "msgspec", "click", "urllib.request")


async def health(service: str, nats: str, *options: str) -> tuple[int, str]:
    """Exit status of the command, and the line that it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.common.health", service, "--nats", nats, *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode is not None
    (line,) = printed.decode().splitlines()
    return process.returncode, line


async def until_healthy(service: str, nats: str, *options: str) -> str:
    """Wait until the command says that all is well, as a container's start does; its line."""
    status, line = 1, ""
    async with asyncio.timeout(DEADLINE_S):
        while status:
            status, line = await health(service, nats, *options)
    return line


@asynccontextmanager
async def service_process(
    service: str, nats: str, *options: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A service, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"prism.{service}", "--nats", nats, *options),
        env={**os.environ, "PRISM_PARENT_PID": str(os.getpid())},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.communicate(), DEADLINE_S)


def options_of(service: str, folder: Path) -> list[str]:
    match service:
        case "gpu_worker":
            return ["--device", "simulated", "--store-socket", str(folder / "store.sock")]
        case "model_store":
            return ["--socket", str(folder / "store.sock"), "--image-dir", str(folder / "images")]
    return []


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "gateway"])
async def test_a_service_is_healthy_for_as_long_as_it_answers_on_the_bus(
    service: str, fresh_nats: NatsServer, tmp_path: Path
) -> None:
    status, line = await health(service, fresh_nats.url)
    assert (status, f"no {service} of this host ({socket.gethostname()})" in line) == (1, True)
    async with service_process(service, fresh_nats.url, *options_of(service, tmp_path)) as process:
        assert "serves" in await until_healthy(service, fresh_nats.url)
        # A process that is there and does nothing is what a check is for.
        process.send_signal(signal.SIGSTOP)
        try:
            status, line = await health(service, fresh_nats.url, "--deadline-s", "2")
        finally:
            process.send_signal(signal.SIGCONT)
        assert (status, "0 of other hosts do" in line) == (1, True)
        await until_healthy(service, fresh_nats.url)
    status, _ = await health(service, fresh_nats.url)
    assert status == 1


async def test_an_instance_of_another_host_is_not_the_own_one(fresh_nats: NatsServer, bus: Bus) -> None:
    async with micro_service(
        bus, "prism-gpu-worker", instance="worker-1", description="", metadata={"host": "elsewhere"}
    ):
        status, line = await health("gpu_worker", fresh_nats.url, "--deadline-s", "2")
        assert (status, "1 of other hosts do" in line) == (1, True)
        async with micro_service(bus, "prism-gpu-worker", instance="worker-2", description=""):
            assert await health("gpu_worker", fresh_nats.url) == (0, "gpu_worker worker-2 serves")


async def test_a_gateway_is_healthy_when_it_could_serve(fresh_nats: NatsServer, bus: Bus) -> None:
    status, line = await health("gateway", fresh_nats.url, "--port", "1")
    assert (status, "no gateway answers at http://127.0.0.1:1/readyz" in line) == (1, True)
    async with service_process("gateway", fresh_nats.url, "--host", "0.0.0.0", "--port", "0") as process:
        assert process.stdout is not None
        ready = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        port = re.findall(rb"\d+", ready)[-1].decode()
        where = ("--host", "0.0.0.0", "--port", port)
        assert f"127.0.0.1:{port} serves" in await until_healthy("gateway", fresh_nats.url, *where)
        bucket = await bus.bucket(subjects.BUCKET_MODELS)
        await bucket.put(subjects.spec_key("m"), encode(ModelSpec("m", "/m")))
        status, line = 0, ""
        async with asyncio.timeout(DEADLINE_S):
            while status == 0:
                status, line = await health("gateway", fresh_nats.url, *where)
        assert "not ready: no worker has reported lately" in line


async def test_without_a_bus_the_line_says_so() -> None:
    status, line = await health("gpu_worker", "nats://user:secret@127.0.0.1:1")
    assert status == 1
    assert line.startswith("no NATS server at 127.0.0.1:1 (")
    assert "PRISM_NATS_URL" in line


async def test_a_server_that_says_nothing_is_not_waited_for_longer_than_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        status, line = await health("gpu_worker", url, "--deadline-s", "0.2")
        assert (status, "says nothing within 0.2 s" in line) == (1, True)


@asynccontextmanager
async def guarded_nats(folder: Path) -> AsyncIterator[str]:
    """The address of a server that asks for a user and a password."""
    process = await asyncio.create_subprocess_exec(
        *(find_nats_server(), "--addr", "127.0.0.1", "--port", "-1", "--user", "u", "--pass", "p"),
        *("--ports_file_dir", str(folder)),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                line = await process.stderr.readline()
                assert line, "the server has ended"
                if found := re.search(rb"client connections on (\S+)", line):
                    break
        yield found[1].decode()
    finally:
        process.terminate()
        await asyncio.wait_for(process.communicate(), DEADLINE_S)


async def test_credentials_stand_in_the_url(tmp_path: Path) -> None:
    async with guarded_nats(tmp_path) as address:
        status, line = await health("gpu_worker", f"nats://{address}")
        assert (status, "Authorization Violation" in line) == (1, True)
        status, line = await health("gpu_worker", f"nats://u:p@{address}")
        assert (status, "no gpu_worker of this host" in line) == (1, True)


def test_it_imports_nothing_heavy() -> None:
    program = f"import sys, prism.common.health; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == "[]"
