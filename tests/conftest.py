"""What all tests share: a real NATS server, and connections to it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from prism.cli.nats_server import NatsServer, nats_server
from prism.cli.tiny_models import make_tiny_models
from prism.common.bus import Bus, connect_bus

# The same examples every time, so that a failure is of the change that it comes with. `make explore` draws
# others. How fast this machine is at the moment is no property of the code.
whatever_it_takes = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", whatever_it_takes, derandomize=True)
settings.register_profile("exploring", whatever_it_takes, derandomize=False)
settings.load_profile("repeatable")

# Kept between runs; writing it is atomic, so two runs at once may share it.
MODELS_FOLDER = Path(__file__).parents[1] / "build" / "tiny-models"


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Path]:
    """Folders of the tiny models, by name."""
    return {folder.name: folder for folder in make_tiny_models(MODELS_FOLDER, report=print)}


@pytest.fixture(scope="session")
def session_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One real NATS server for the tests that can share one."""
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def fresh_nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS server of the test's own, with nothing on it."""
    with nats_server(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def bus(fresh_nats: NatsServer) -> AsyncIterator[Bus]:
    """A connection to the test's own server."""
    async with connect_bus(fresh_nats.url, name="test") as connected:
        yield connected
