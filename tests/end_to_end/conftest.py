"""One running system for all end-to-end tests: real NATS, real services, real engines, three tiny models.

The worker has room for two of the three, so that tests see models sleep and wake.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.end_to_end.observing import DEADLINE_S, Watcher, watching

from prism.cli.demo import WORKER_MEMORY_GB, tiny_placement
from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common.bus import connect_bus


@pytest.fixture(scope="session")
async def system(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningSystem]:
    """The whole system, all its services real."""
    folder = tmp_path_factory.mktemp("system")
    placement = folder / "placement.json"
    placement.write_bytes(msgspec.json.encode(tiny_placement(list(tiny_models.values()))))
    log = (folder / "services.log").open("w", buffering=1)
    settings = SystemSettings(
        placement=placement,
        worker_memory_gb=WORKER_MEMORY_GB,
        store_memory_gb=1.0,
        image_dir=folder / "images",
    )
    with log:
        async with running_system(settings, lambda name, line: print(name, line, file=log)) as running:
            yield running


@pytest.fixture(scope="session")
async def client(system: RunningSystem) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the gateway."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=system.gateway_url, timeout=DEADLINE_S, limits=limits) as connected:
        yield connected


@pytest.fixture
async def watcher(system: RunningSystem) -> AsyncIterator[Watcher]:
    """What the system tells from now on."""
    async with connect_bus(system.nats_url, name="test") as bus, watching(bus) as watch:
        await watch.until(lambda: bool(watch.reports))
        yield watch
