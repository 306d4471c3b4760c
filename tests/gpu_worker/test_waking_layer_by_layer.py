"""Requests that come to a real engine while the last of its weights are still being copied back."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.gpu_worker.test_kv_quotas import instance_of, output
from tests.gpu_worker.test_tensor_parallel import command as in_two_ranks
from tests.gpu_worker.test_worker import DEADLINE_S, Rig, last_error, send, store_process, worker_rig

from prism.cli.nats_server import NatsServer
from prism.common.errors import ErrorCode
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind, CommandOutcome
from prism.gpu_worker.devices.cpu import CpuDevice
from prism.gpu_worker.engine_protocol import EngineOptions
from prism.gpu_worker.started_shells import started_shells

pytestmark = pytest.mark.engine

PROMPT = list(range(7, 107))
# As soon as the first piece is there: all layers are still to come.
LEAD_S = 1000.0


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """While this file is there, the last piece of a copy fails."""
    return tmp_path / "broken"


@pytest.fixture
async def rig(
    monkeypatch: pytest.MonkeyPatch,
    session_nats: NatsServer,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    broken: Path,
) -> AsyncIterator[Rig]:
    monkeypatch.setattr(CpuDevice, "options", EngineOptions(wake_lead_s=LEAD_S))
    environment = {"PRISM_TEST_BROKEN_COPY": str(broken)}
    async with (
        store_process(session_nats, tmp_path) as store,
        started_shells("tests.gpu_worker.slow_copy_shell", environment=environment) as shells,
        worker_rig(session_nats, store, shells, tiny_models) as ready,
    ):
        yield ready


async def woken_until_weights_are_under_way(
    rig: Rig, command: Callable[[Rig, CommandKind], Coroutine[Any, Any, CommandOutcome]] = Rig.command
) -> "asyncio.Task[CommandOutcome]":
    """A wake whose engine takes requests, and has not all of its weights."""
    waking = asyncio.create_task(command(rig, CommandKind.ACTIVATE))
    async with asyncio.timeout(DEADLINE_S):
        while instance_of(rig).weights_arrived_at != math.inf:
            assert not waking.done()
            await asyncio.sleep(0.001)
    assert instance_of(rig).state is ModelState.ACTIVE
    return waking


async def test_what_is_said_then_is_what_is_said_otherwise(rig: Rig) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 12))
    assert len(said) == 12
    for turn in ("first", "second"):
        assert (await rig.command(CommandKind.DOZE)).error is None
        waking = await woken_until_weights_are_under_way(rig)
        asked = await send(rig, turn, PROMPT, 12)
        assert not waking.done()
        assert await output(rig, asked) == said
        outcome = await waking
        assert outcome.error is None
        # 24 MB in pieces of 256 KiB, one or two at a time.
        assert outcome.seconds["copy"] > 0.5


async def test_a_copy_that_fails_then_ends_the_engine_and_the_next_request_starts_it_anew(
    rig: Rig, broken: Path
) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 4))
    assert (await rig.command(CommandKind.DOZE)).error is None
    await asyncio.to_thread(broken.touch)
    waking = await woken_until_weights_are_under_way(rig)
    frames = await send(rig, "lost", PROMPT, 4)
    outcome = await waking
    assert outcome.error is not None
    assert outcome.error.code in (ErrorCode.INTERNAL, ErrorCode.ENGINE_LOST)
    error = await last_error(frames)
    assert error.code is ErrorCode.ENGINE_LOST
    assert error.retry
    await asyncio.to_thread(broken.unlink)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert await output(rig, await send(rig, "after", PROMPT, 4)) == said


async def test_an_engine_that_dies_then_is_told_of_at_once(rig: Rig) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 4))
    assert (await rig.command(CommandKind.DOZE)).error is None
    waking = await woken_until_weights_are_under_way(rig)
    engine = instance_of(rig).engine
    assert engine is not None
    engine.kill()
    outcome = await waking
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.ENGINE_LOST
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert await output(rig, await send(rig, "after", PROMPT, 4)) == said


async def test_each_of_two_ranks_waits_for_its_own(rig: Rig) -> None:
    assert (await in_two_ranks(rig, CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 12))
    assert (await in_two_ranks(rig, CommandKind.DOZE)).error is None
    waking = await woken_until_weights_are_under_way(rig, in_two_ranks)
    assert await output(rig, await send(rig, "meanwhile", PROMPT, 12)) == said
    assert (await waking).error is None
