"""Engines that answer a request of their own before they serve: nobody else sees anything of it."""

from pathlib import Path

import pytest
from tests.gpu_worker.test_kv_quotas import instance_of, output
from tests.gpu_worker.worker_rig import send, store_process, worker_rig

from prism.cli.nats_server import NatsServer
from prism.common.messages.placement import CommandKind
from prism.gpu_worker.devices.cpu import CpuDevice
from prism.gpu_worker.engine_protocol import EngineOptions
from prism.gpu_worker.shells import ForkServerShells

pytestmark = pytest.mark.engine

# It begins as the priming request does: a cached prefix of that would be used.
PROMPT = [1] * 100


async def test_a_primed_engine_serves_with_nothing_cached_and_says_the_same_through_sleep(
    monkeypatch: pytest.MonkeyPatch,
    session_nats: NatsServer,
    shells: ForkServerShells,
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    said: dict[bool, list[int]] = {}
    async with store_process(session_nats, tmp_path) as store:
        for primed in (False, True):
            monkeypatch.setattr(CpuDevice, "options", EngineOptions(prime=primed))
            async with worker_rig(session_nats, store, shells, tiny_models) as rig:
                outcome = await rig.command(CommandKind.ACTIVATE)
                assert outcome.error is None
                assert (outcome.seconds["prime"] > 0.001) == primed
                load = instance_of(rig).engine_load
                assert (load.kv_used_tokens, load.kv_cached_tokens) == (0, 0)
                said[primed] = await output(rig, await send(rig, "a", PROMPT, 12))
                for kind in (CommandKind.DOZE, CommandKind.ACTIVATE):
                    assert (await rig.command(kind)).error is None
                assert await output(rig, await send(rig, "b", PROMPT, 12)) == said[primed]
    assert len(said[True]) == 12
    assert said[True] == said[False]
