"""Unmodified clients against one running system with real engines; each client is a process of its own."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from tests.clients.client_process import run_client
from tests.clients.gateway_counts import GatewayCounts
from tests.end_to_end.conftest import client, system

__all__ = ["client", "system"]

MODEL = "tiny-llama"
ENVIRONMENT = Path(__file__).parents[2] / "build" / "clients"
CLIENTS = ENVIRONMENT / "clients"
BENCH_SERVING_PACKAGES = ENVIRONMENT / "bench-serving-packages"

Run = Callable[..., Awaitable[str]]
Count = Callable[[], Awaitable[GatewayCounts]]


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    """Skips all, before the system is started, where the clients' packages are missing."""
    if not (ENVIRONMENT / ".ready").exists():
        pytest.skip("the clients' packages are not installed; `make test-clients` does it")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a client's command line to its end in a folder of the test's own; see `run_client`."""

    async def run_here(*command: str | Path, **variables: str) -> str:
        return await run_client([str(part) for part in command], variables, tmp_path)

    return run_here


@pytest.fixture
def count(client: httpx.AsyncClient) -> Count:
    """Reads what the gateway has counted."""

    async def counts() -> GatewayCounts:
        return GatewayCounts((await client.get("/metrics")).text)

    return counts
