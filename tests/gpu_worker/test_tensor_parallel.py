"""One engine in two ranks, each a process, over gloo on a CPU: it says what it says in one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from tests.gpu_worker.worker_rig import (
    DEADLINE_S,
    KV_BYTES,
    SMALL,
    Rig,
    last_error,
    send,
    tokens_of,
    worker_rig,
)

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.errors import ErrorCode
from prism.common.messages.generation import SamplingParams
from prism.common.messages.models import ModelSpec, ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.gpu_worker.shells import ForkServerShells

pytestmark = pytest.mark.engine

RANKS = 2


@pytest.fixture
async def rig(
    session_nats: NatsServer, module_store: Path, shells: ForkServerShells, tiny_models: dict[str, Path]
) -> AsyncIterator[Rig]:
    async with worker_rig(session_nats, module_store, shells, tiny_models) as ready:
        yield ready


async def command(rig: Rig, kind: CommandKind, tp_size: int = RANKS) -> CommandOutcome:
    spec = ModelSpec(SMALL, str(rig.models[SMALL]), tp_size=tp_size)
    told = Command(kind, 1, spec, rig.facts(SMALL), DEADLINE_S, drain_s=20.0, kv_bytes=KV_BYTES)
    return await rig.bus.request(subjects.command(rig.id), told, CommandOutcome, timeout_s=DEADLINE_S)


def other_rank(rig: Rig) -> psutil.Process:
    """The process of rank 1."""
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    (process,) = psutil.Process(engine.pid).children()
    return process


async def test_two_ranks_say_what_one_says_before_and_after_sleep(rig: Rig) -> None:
    assert (await command(rig, CommandKind.ACTIVATE, 1)).error is None
    alone = tokens_of(await (await send(rig, "a", [5, 6, 7], 24)).all())
    in_one = rig.load().weights_bytes
    await command(rig, CommandKind.RELEASE)

    outcome = await command(rig, CommandKind.ACTIVATE)
    assert outcome.error is None, outcome.error
    assert tokens_of(await (await send(rig, "b", [5, 6, 7], 24)).all()) == alone
    assert rig.load().weights_bytes == pytest.approx(in_one, rel=0.05), "norms are held twice, no more"
    assert rig.load().kv_used_bytes > 0

    assert (await command(rig, CommandKind.DOZE)).state is ModelState.DOZING
    assert (rig.load().weights_bytes, rig.load().kv_used_bytes) == (0, 0)
    outcome = await command(rig, CommandKind.ACTIVATE)
    assert outcome.state is ModelState.ACTIVE
    assert tokens_of(await (await send(rig, "c", [5, 6, 7], 24)).all()) == alone

    drawn = SamplingParams(16, temperature=0.9, seed=7, ignore_eos=True)
    first = tokens_of(await (await send(rig, "d", [5, 6], 16, sampling=drawn)).all())
    assert tokens_of(await (await send(rig, "e", [5, 6], 16, sampling=drawn)).all()) == first
    await command(rig, CommandKind.RELEASE)


async def test_the_second_start_takes_an_image_for_each_rank(rig: Rig) -> None:
    await command(rig, CommandKind.ACTIVATE)
    first = tokens_of(await (await send(rig, "a", [9, 8, 7], 8)).all())
    await command(rig, CommandKind.DOZE)
    await command(rig, CommandKind.RELEASE)
    assert (await command(rig, CommandKind.ACTIVATE)).error is None
    instance = rig.worker.instances[SMALL]
    assert instance.ready is not None
    assert instance.ready.imaged
    assert tokens_of(await (await send(rig, "b", [9, 8, 7], 8)).all()) == first


async def test_a_rank_that_dies_ends_its_engine_and_leaves_no_process(rig: Rig) -> None:
    await command(rig, CommandKind.ACTIVATE)
    frames = await send(rig, "a", [5, 6, 7], 1500)
    assert await frames.next() is not None
    other = other_rank(rig)
    other.kill()
    assert (await last_error(frames)).code is ErrorCode.ENGINE_LOST
    await rig.until_state(ModelState.COLD)
    assert rig.worker.ledger.reserved_bytes == 0


async def test_ranks_end_with_their_engine(rig: Rig) -> None:
    await command(rig, CommandKind.ACTIVATE)
    other = other_rank(rig)
    await command(rig, CommandKind.RELEASE)
    await asyncio.to_thread(other.wait, DEADLINE_S)
    assert not other.is_running()


async def test_more_ranks_than_a_device_has_are_refused(rig: Rig) -> None:
    outcome = await command(rig, CommandKind.ACTIVATE, 16)
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.UNSUPPORTED
    assert "wants tp_size 16" in outcome.error.message
    assert outcome.state is ModelState.COLD
