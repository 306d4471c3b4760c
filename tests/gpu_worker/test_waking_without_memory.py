"""A real engine that wakes where there is memory for its weights, and none for its KV cache."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.gpu_worker.test_kv_quotas import instance_of, output
from tests.gpu_worker.worker_rig import Rig, send, store_process, worker_rig

from prism.cli.nats_server import NatsServer
from prism.common.errors import ErrorCode
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind
from prism.gpu_worker.started_shells import started_shells

pytestmark = pytest.mark.engine


@pytest.fixture
def scarce(tmp_path: Path) -> Path:
    """While this file is there, a wake finds no memory for the KV cache."""
    return tmp_path / "scarce"


@pytest.fixture
async def rig(
    session_nats: NatsServer, tiny_models: dict[str, Path], tmp_path: Path, scarce: Path
) -> AsyncIterator[Rig]:
    environment = {"PRISM_TEST_NO_KV_MEMORY": str(scarce)}
    async with (
        store_process(session_nats, tmp_path) as store,
        started_shells("tests.gpu_worker.scarce_kv_shell", environment=environment) as shells,
        worker_rig(session_nats, store, shells, tiny_models) as ready,
    ):
        yield ready


async def test_it_dozes_on_with_nothing_mapped_and_wakes_once_there_is_memory(rig: Rig, scarce: Path) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", [5, 6, 7], 8))
    assert (await rig.command(CommandKind.DOZE)).error is None
    engine = instance_of(rig).engine
    await asyncio.to_thread(scarce.touch)
    for _ in range(2):
        outcome = await rig.command(CommandKind.ACTIVATE)
        assert outcome.error is not None
        assert (outcome.error.code, outcome.state) == (ErrorCode.OUT_OF_MEMORY, ModelState.DOZING)
        assert instance_of(rig).counted.left_bytes() == 0
    await asyncio.to_thread(scarce.unlink)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert instance_of(rig).engine is engine, "it was not started anew"
    assert await output(rig, await send(rig, "after", [5, 6, 7], 8)) == said
