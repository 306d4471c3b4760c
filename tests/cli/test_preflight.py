"""What `prism up` finds before it starts anything: one line that says what is wrong and what to do."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prism.cli import preflight
from prism.cli.nats_server import find_nats_server, listening_url, nats_server
from prism.cli.preflight import check_before_start, check_bus
from prism.cli.system import SystemSettings
from prism.common.errors import PrismError

DEADLINE_S = 10.0
SOON_S = 0.3


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@contextmanager
def nats_without_jetstream(folder: Path) -> Iterator[str]:
    command = [find_nats_server(), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(folder)]
    with subprocess.Popen([*command, "-l", str(folder / "log")]) as server:
        try:
            while not (url := listening_url(folder, server.pid)):
                assert server.poll() is None
                time.sleep(0.005)
            yield url
        finally:
            server.terminate()


@pytest.mark.parametrize(
    "url", ["foo", "http://127.0.0.1:4222", "nats://", "nats://127.0.0.1:none", "nats://127.0.0.1:99999", ""]
)
async def test_what_is_no_url_of_a_nats_server_is_refused(url: str) -> None:
    with pytest.raises(PrismError, match="is no URL of a NATS server; nats://HOST:PORT is one"):
        await check_bus(url)


async def test_a_bus_that_is_not_there_is_not_waited_for_long(
    taken_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PrismError, match=r"no NATS server at nats://127\.0\.0\.1:1 within .*start one"):
        await check_bus("nats://127.0.0.1:1", SOON_S)
    with pytest.raises(PrismError, match="no NATS server at"):
        await check_bus(f"nats://127.0.0.1:{taken_port}", SOON_S)
    assert not caplog.records, "one line is enough"


async def test_a_bus_is_taken_with_a_scheme_and_without(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        await check_bus(server.url)
        await check_bus(server.url.removeprefix("nats://"))


async def test_a_bus_without_jetstream_is_refused(tmp_path: Path) -> None:
    with (
        nats_without_jetstream(tmp_path) as url,
        pytest.raises(PrismError, match="has no JetStream: start it with --jetstream"),
    ):
        await check_bus(url)


async def test_a_taken_port_is_found(taken_port: int) -> None:
    with pytest.raises(
        PrismError, match=f"cannot listen on 127.0.0.1:{taken_port}: .* in use; choose another"
    ):
        await check_before_start(SystemSettings(Path("p"), port=taken_port))
    await check_before_start(SystemSettings(Path("p"), port=0))


async def test_the_port_of_each_gateway_counts(taken_port: int) -> None:
    with pytest.raises(PrismError, match=f"cannot listen on 127.0.0.1:{taken_port}: "):
        await check_before_start(SystemSettings(Path("p"), port=taken_port - 1, gateways=2))
    with pytest.raises(PrismError, match="the highest port is 65535"):
        await check_before_start(SystemSettings(Path("p"), port=65535, gateways=2))


async def test_workers_on_cuda_need_packages_that_the_cpu_profile_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "GPU_MODULES", ("asyncio", "not_installed_anywhere"))
    with pytest.raises(
        PrismError, match=r"\(not_installed_anywhere\): make setup PROFILE=gpu, or docs/gpu.md"
    ):
        await check_before_start(SystemSettings(Path("p"), device="cuda"))
    await check_before_start(SystemSettings(Path("p"), device="cpu"))
