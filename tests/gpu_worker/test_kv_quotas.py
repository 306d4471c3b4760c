"""KV quotas on real engines: lowered and raised while they work, with nothing lost and memory given back."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.gpu_worker.worker_rig import (
    SMALL,
    Frames,
    Rig,
    last_error,
    send,
    store_process,
    tokens_of,
    worker_rig,
)

from prism.cli.nats_server import NatsServer
from prism.common.errors import ErrorCode
from prism.common.messages.generation import TokenFrame
from prism.common.messages.placement import CommandKind
from prism.gpu_worker.model_instance import ModelInstance
from prism.gpu_worker.shells import ForkServerShells

pytestmark = pytest.mark.engine

MB = 1_000_000
PROMPTS = [[7 + i, 11, 13 + i] * 20 for i in range(4)]
LENGTH = 300


@pytest.fixture
async def rig(
    session_nats: NatsServer, shells: ForkServerShells, tiny_models: dict[str, Path], tmp_path: Path
) -> AsyncIterator[Rig]:
    """A worker that serves SMALL."""
    async with (
        store_process(session_nats, tmp_path) as store,
        worker_rig(session_nats, store, shells, tiny_models) as ready,
    ):
        outcome = await ready.command(CommandKind.ACTIVATE)
        assert outcome.error is None
        yield ready


def instance_of(rig: Rig) -> ModelInstance:
    return rig.worker.instances[SMALL]


def resident_kv(rig: Rig) -> int:
    """KV memory of the engine, as the kernel counts it."""
    return instance_of(rig).counted.resident_bytes()[1]


async def start_all(rig: Rig, name: str) -> list[Frames]:
    return [await send(rig, f"{name}{i}", ids, LENGTH, priority=i) for i, ids in enumerate(PROMPTS)]


def quota_for(rig: Rig, tokens: int) -> int:
    """Bytes of a quota that has room for about so many tokens."""
    ready = instance_of(rig).ready
    assert ready is not None
    return ready.kv_overhead_bytes + tokens * ready.kv_bytes_per_token


async def output(rig: Rig, stream: Frames) -> list[int]:
    frames: list[TokenFrame] = []
    while not frames or (frames[-1].finish is None and frames[-1].error is None):
        frame = await stream.next()
        assert frame is not None
        frames.append(frame)
    assert frames[-1].error is None
    return tokens_of(frames)


async def test_requests_that_had_to_wait_for_memory_say_what_they_would_have_said(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = [await output(rig, stream) for stream in await start_all(rig, "a")]
    assert [len(tokens) for tokens in undisturbed] == [LENGTH] * 4
    instance = instance_of(rig)
    before = rig.worker.ledger.held(SMALL).kv
    streams = await start_all(rig, "b")
    collected: list[list[int]] = [[] for _ in streams]

    async def collect(index: int) -> None:
        while True:
            frame = await streams[index].next()
            assert frame is not None
            assert frame.error is None
            collected[index] += frame.tokens
            if len(collected[index]) >= 120:
                decoding.add(index)
            if len(decoding) == 4:
                all_decode.set()
            if frame.finish is not None:
                return

    decoding: set[int] = set()
    all_decode = asyncio.Event()
    collectors = asyncio.gather(*(collect(index) for index in range(4)))
    await asyncio.wait_for(all_decode.wait(), 30)
    # Room for two of the four, and for any one until its end: no more may come before it needs it.
    lowered = quota_for(rig, 400)
    with caplog.at_level(logging.INFO):
        assert await instance.set_quota(lowered)
    assert "requests wait for memory" in caplog.text
    assert rig.worker.ledger.held(SMALL).kv == lowered
    assert resident_kv(rig) <= lowered
    await asyncio.wait_for(collectors, 60)
    assert resident_kv(rig) <= rig.worker.ledger.held(SMALL).kv <= before
    assert collected == undisturbed


async def test_a_lowered_quota_evicts_prefixes_and_gives_their_memory_back(rig: Rig) -> None:
    long_prompt = [3 + index % 200 for index in range(1500)]
    first = await output(rig, await send(rig, "a", long_prompt, 8))
    assert rig.load().kv_used_bytes == resident_kv(rig)
    assert instance_of(rig).engine_load.kv_cached_tokens >= 1500
    lowered = quota_for(rig, 300)
    assert await instance_of(rig).set_quota(lowered)
    assert resident_kv(rig) <= lowered
    assert instance_of(rig).engine_load.kv_cached_tokens <= 300
    assert instance_of(rig).memory.kv_tokens >= 299
    # Grown again by demand, it serves what did not fit meanwhile.
    assert await output(rig, await send(rig, "b", long_prompt, 8)) == first
    assert rig.worker.ledger.held(SMALL).kv > lowered


async def test_a_model_sleeps_and_wakes_with_the_quota_that_it_had(rig: Rig) -> None:
    lowered = quota_for(rig, 600)
    assert await instance_of(rig).set_quota(lowered)
    assert (await rig.command(CommandKind.DOZE)).error is None
    assert rig.worker.ledger.held(SMALL).kv == 0
    assert not await instance_of(rig).set_quota(2 * lowered), "nothing to change while it sleeps"
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert rig.worker.ledger.held(SMALL).kv == lowered
    assert len(await output(rig, await send(rig, "a", [5, 6, 7], 12))) == 12
    assert resident_kv(rig) <= rig.worker.ledger.held(SMALL).kv


async def test_a_lone_request_that_runs_out_of_memory_is_to_go_on_and_not_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody raises the quota again.
    monkeypatch.setattr(rig.worker.quotas, "_step", lambda: None)
    stream = await send(rig, "a", PROMPTS[0], LENGTH)
    generated: list[int] = []
    while len(generated) < 5:
        frame = await stream.next()
        assert frame is not None
        generated += frame.tokens
    assert await instance_of(rig).set_quota(quota_for(rig, 80))
    error = await last_error(stream)
    assert (error.code, error.retry) == (ErrorCode.MOVED, True)
    assert "memory" in error.message
