"""Warm shells for all worker tests: SGLang is imported once a session."""

from collections.abc import AsyncIterator

import pytest

from prism.gpu_worker.shells import ForkServerShells, fork_server_shells


@pytest.fixture(scope="session")
async def shells() -> AsyncIterator[ForkServerShells]:
    """A fork server that the tests share."""
    async with fork_server_shells() as source:
        yield source
