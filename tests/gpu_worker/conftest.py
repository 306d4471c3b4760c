"""Warm shells for all worker tests, SGLang being imported once a session, and stores that modules share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.gpu_worker.worker_rig import store_process

from prism.cli.nats_server import NatsServer
from prism.gpu_worker.shells import ForkServerShells, fork_server_shells


@pytest.fixture(scope="session")
async def shells() -> AsyncIterator[ForkServerShells]:
    """A fork server that the tests share."""
    async with fork_server_shells() as source:
        yield source


@pytest.fixture(scope="module")
async def module_store(
    session_nats: NatsServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Path]:
    """The socket of a store that the tests of a module share."""
    async with store_process(session_nats, tmp_path_factory.mktemp("store")) as socket:
        yield socket
