"""Requests whose tokens nobody waits for one by one, at a real engine: it says them some at a time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.gpu_worker.test_kv_quotas import instance_of
from tests.gpu_worker.worker_rig import Rig, send, store_process, tokens_of, worker_rig

from prism.cli.nats_server import NatsServer
from prism.common.messages.generation import TokenFrame
from prism.common.messages.placement import CommandKind
from prism.gpu_worker.devices.cpu import CpuDevice
from prism.gpu_worker.engine_protocol import EngineOptions
from prism.gpu_worker.shells import ForkServerShells

pytestmark = pytest.mark.engine

PROMPT = [5, 6, 7]
NEVER_S = 1e6


@pytest.fixture
async def rig(
    monkeypatch: pytest.MonkeyPatch,
    session_nats: NatsServer,
    shells: ForkServerShells,
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    """A worker whose engines say such tokens with the end only."""
    monkeypatch.setattr(CpuDevice, "options", EngineOptions(unstreamed_s=NEVER_S))
    async with (
        store_process(session_nats, tmp_path) as store,
        worker_rig(session_nats, store, shells, tiny_models) as ready,
    ):
        assert (await ready.command(CommandKind.ACTIVATE)).error is None
        yield ready


def parts(frames: list[TokenFrame]) -> list[int]:
    """How many tokens each frame brought, of those that brought some."""
    return [len(frame.tokens) for frame in frames if frame.tokens]


async def test_the_first_token_comes_at_once_and_the_others_with_the_last(rig: Rig) -> None:
    streamed = await (await send(rig, "a", PROMPT, 12)).all()
    together = await (await send(rig, "b", PROMPT, 12, streamed=False)).all()
    assert parts(streamed) == 12 * [1]
    assert parts(together) == [1, 11]
    assert tokens_of(together) == tokens_of(streamed)
    assert together[-1].finish is not None
    assert together[-1].finish.completion_tokens == 12


async def test_steps_are_counted_though_their_tokens_are_not_said(rig: Rig) -> None:
    await (await send(rig, "a", PROMPT, 24, streamed=False)).all()
    assert instance_of(rig).record.step.seconds is not None


async def test_a_neighbour_with_log_probabilities_changes_nothing(rig: Rig) -> None:
    asked = [
        await send(rig, "a", PROMPT, 12, streamed=False, top_logprobs=2),
        await send(rig, "b", PROMPT, 12, streamed=False),
        await send(rig, "c", PROMPT, 12),
    ]
    with_logprobs, together, streamed = await asyncio.gather(*(frames.all() for frames in asked))
    assert parts(with_logprobs) == parts(streamed) == 12 * [1]
    assert parts(together) == [1, 11]
    assert sum(len(frame.logprobs or []) for frame in with_logprobs) == 12
    assert all(frame.logprobs is None for frame in [*together, *streamed])
    assert tokens_of(with_logprobs) == tokens_of(together) == tokens_of(streamed)
