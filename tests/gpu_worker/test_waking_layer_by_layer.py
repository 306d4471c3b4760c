"""Requests that come to a real engine while the last of its weights are still being copied back."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.gpu_worker.test_kv_quotas import instance_of, output
from tests.gpu_worker.test_tensor_parallel import command as in_two_ranks
from tests.gpu_worker.worker_rig import (
    DEADLINE_S,
    SMALL,
    Rig,
    last_error,
    send,
    store_process,
    worker_rig,
)

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.errors import ErrorCode
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind, CommandOutcome, Route
from prism.common.mirror import mirror_bucket
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
def held(tmp_path: Path) -> Path:
    """While this file is there, the last piece of a copy waits."""
    return tmp_path / "held"


@pytest.fixture
async def rig(
    monkeypatch: pytest.MonkeyPatch,
    session_nats: NatsServer,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    held: Path,
    broken: Path,
) -> AsyncIterator[Rig]:
    monkeypatch.setattr(CpuDevice, "options", EngineOptions(wake_lead_s=LEAD_S))
    environment = {"PRISM_TEST_HELD_COPY": str(held), "PRISM_TEST_BROKEN_COPY": str(broken)}
    async with (
        store_process(session_nats, tmp_path) as store,
        started_shells("tests.gpu_worker.slow_copy_shell", environment=environment) as shells,
        worker_rig(session_nats, store, shells, tiny_models) as ready,
    ):
        yield ready


async def woken_until_weights_are_under_way(
    rig: Rig,
    held: Path,
    command: Callable[[Rig, CommandKind], Coroutine[Any, Any, CommandOutcome]] = Rig.command,
) -> "asyncio.Task[CommandOutcome]":
    """A wake whose engine takes requests, and has not all of its weights while `held` is there."""
    await asyncio.to_thread(held.touch)
    # As gateways do: a model may be active a moment before the bus knows who listens.
    routed = asyncio.Event()

    def on_change(_: str, route: Route | None) -> None:
        if route is not None:
            routed.set()

    key = subjects.route_key(SMALL, rig.id)
    async with mirror_bucket(rig.bus, subjects.BUCKET_ROUTES, Route, pattern=key, on_change=on_change):
        assert not routed.is_set()
        waking = asyncio.create_task(command(rig, CommandKind.ACTIVATE))
        await asyncio.wait_for(routed.wait(), DEADLINE_S)
    assert not waking.done()
    assert instance_of(rig).weights_arrived_at == math.inf
    assert instance_of(rig).state is ModelState.ACTIVE
    return waking


async def test_what_is_said_then_is_what_is_said_otherwise(rig: Rig, held: Path) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 12))
    assert len(said) == 12
    for turn in ("first", "second"):
        assert (await rig.command(CommandKind.DOZE)).error is None
        waking = await woken_until_weights_are_under_way(rig, held)
        asked = await send(rig, turn, PROMPT, 12)
        assert not waking.done()
        await asyncio.to_thread(held.unlink)
        assert await output(rig, asked) == said
        assert (await waking).error is None


async def test_a_copy_that_fails_then_ends_the_engine_and_the_next_request_starts_it_anew(
    rig: Rig, held: Path, broken: Path
) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 4))
    assert (await rig.command(CommandKind.DOZE)).error is None
    await asyncio.to_thread(broken.touch)
    waking = await woken_until_weights_are_under_way(rig, held)
    frames = await send(rig, "lost", PROMPT, 4)
    await asyncio.to_thread(held.unlink)
    outcome = await waking
    assert outcome.error is not None
    assert outcome.error.code in (ErrorCode.INTERNAL, ErrorCode.ENGINE_LOST)
    error = await last_error(frames)
    assert error.code is ErrorCode.ENGINE_LOST
    assert error.retry
    await asyncio.to_thread(broken.unlink)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert await output(rig, await send(rig, "after", PROMPT, 4)) == said


async def test_an_engine_that_dies_then_is_told_of_at_once(rig: Rig, held: Path) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 4))
    assert (await rig.command(CommandKind.DOZE)).error is None
    waking = await woken_until_weights_are_under_way(rig, held)
    engine = instance_of(rig).engine
    assert engine is not None
    engine.kill()
    outcome = await waking
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.ENGINE_LOST
    await asyncio.to_thread(held.unlink)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert await output(rig, await send(rig, "after", PROMPT, 4)) == said


async def test_each_of_two_ranks_waits_for_its_own(rig: Rig, held: Path) -> None:
    assert (await in_two_ranks(rig, CommandKind.ACTIVATE)).error is None
    said = await output(rig, await send(rig, "before", PROMPT, 12))
    assert (await in_two_ranks(rig, CommandKind.DOZE)).error is None
    waking = await woken_until_weights_are_under_way(rig, held, in_two_ranks)
    asked = await send(rig, "meanwhile", PROMPT, 12)
    await asyncio.to_thread(held.unlink)
    assert await output(rig, asked) == said
    assert (await waking).error is None
