"""Engine hosts as real processes: how they start, fail, and end."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine_process import EngineEvents, EngineProcess
from prism.gpu_worker.engine_protocol import StartEngine
from prism.gpu_worker.shells import ForkServerShells, fork_server_shells

pytestmark = pytest.mark.engine

DEADLINE_S = 30.0


def events() -> EngineEvents:
    return EngineEvents(
        on_outputs=lambda _: None,
        on_weights_sized=lambda _: True,
        on_progress=lambda _: None,
        on_imaged=lambda _: None,
    )


def start_message(call: int, socket: Path) -> StartEngine:
    return StartEngine(
        call=call,
        model="nothing",
        model_path="/nowhere",
        store_socket=str(socket),
        layout="test",
        dtype="float32",
        kv_bytes=1_000_000,
        max_running_requests=4,
        chunked_prefill_tokens=128,
        copy_threads=1,
        store_deadline_s=5.0,
    )


async def opened(shells: ForkServerShells) -> EngineProcess:
    engine = EngineProcess(await shells.take(), events())
    await engine.open()
    return engine


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.core
async def test_closing_a_shell_ends_its_process(shells: ForkServerShells) -> None:
    engine = await opened(shells)
    assert is_running(engine.pid)
    await engine.close()
    assert engine.ended.result() == "exit status 0"
    assert not is_running(engine.pid)


async def test_a_killed_engine_fails_what_is_asked_of_it(shells: ForkServerShells) -> None:
    engine = await opened(shells)
    # It must not get to read what it is asked.
    os.kill(engine.pid, signal.SIGSTOP)
    asked = asyncio.ensure_future(engine.wake(DEADLINE_S))
    await asyncio.sleep(0)
    engine.kill()
    with pytest.raises(PrismError) as caught:
        await asked
    assert caught.value.code is ErrorCode.ENGINE_LOST
    assert await asyncio.wait_for(engine.ended, DEADLINE_S) == "killed by SIGKILL"
    with pytest.raises(PrismError, match="is gone"):
        engine.abort("r")
    await engine.close()


async def test_a_start_without_a_store_says_what_is_missing(shells: ForkServerShells, tmp_path: Path) -> None:
    engine = await opened(shells)
    with pytest.raises(PrismError) as caught:
        await engine.start(lambda call: start_message(call, tmp_path / "no.sock"), DEADLINE_S)
    assert caught.value.code is ErrorCode.STORE_UNAVAILABLE
    assert str(tmp_path / "no.sock") in caught.value.message
    assert await asyncio.wait_for(engine.ended, DEADLINE_S) == "exit status 3"
    await engine.close()


async def test_a_shell_that_is_told_nonsense_ends(shells: ForkServerShells) -> None:
    engine = await opened(shells)
    engine.abort("not a start")
    ended = await asyncio.wait_for(engine.ended, DEADLINE_S)
    assert ended == "TypeError: the first message must be StartEngine, not Abort (exit status 3)"
    await engine.close()


async def test_many_shells_at_once_are_all_different_and_all_end(shells: ForkServerShells) -> None:
    engines = await asyncio.gather(*(opened(shells) for _ in range(8)))
    assert len({engine.pid for engine in engines}) == 8
    await asyncio.gather(*(engine.close() for engine in engines))
    assert not any(is_running(engine.pid) for engine in engines)


async def test_shells_die_with_their_fork_server_and_it_is_started_again() -> None:
    async with fork_server_shells() as shells:
        engine = await opened(shells)
        assert shells._process is not None
        shells._process.kill()
        await asyncio.wait_for(engine.ended, DEADLINE_S)
        await engine.close()
        again = await opened(shells)
        await again.close()
    assert not is_running(engine.pid)
