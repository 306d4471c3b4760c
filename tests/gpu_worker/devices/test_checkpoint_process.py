"""The worker's side of the checkpoint server: a real process, over a stand-in for libcuda."""

import sys
from pathlib import Path

import psutil
import pytest
from tests.gpu_worker.devices.checkpoint_server_process import DYING, HANGING
from tests.gpu_worker.devices.fake_libcuda import ILLEGAL_STATE, OUT_OF_MEMORY

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.devices.checkpoint_process import checkpoint_process

COMMAND = (sys.executable, "-m", "tests.gpu_worker.devices.checkpoint_server_process")
PID, OTHER = 4711, 4712
DEADLINE_S = 20.0


def servers() -> list[psutil.Process]:
    """Checkpoint servers of this process."""
    return [child for child in psutil.Process().children() if "checkpoint_server" in str(child.cmdline())]


async def test_processes_are_frozen_and_thawed_and_the_server_ends() -> None:
    async with checkpoint_process({}, COMMAND) as freezer:
        freezer.check()
        assert (await freezer.freeze(PID, DEADLINE_S)).keys() == {"lock", "checkpoint"}
        await freezer.freeze(OTHER, DEADLINE_S)
        assert (await freezer.thaw(PID, DEADLINE_S)).keys() == {"restore", "unlock"}
        assert len(servers()) == 1
    assert not servers()


async def test_a_process_that_could_not_be_frozen_but_runs_is_not_lost() -> None:
    failing = {"FAILING": f'{{"checkpoint": {OUT_OF_MEMORY}}}'}
    async with checkpoint_process(failing, COMMAND) as freezer:
        with pytest.raises(PrismError, match="CUDA_ERROR_OUT_OF_MEMORY") as error:
            await freezer.freeze(PID, DEADLINE_S)
        assert (error.value.code, error.value.retry) == (ErrorCode.INTERNAL, True)


async def test_a_process_that_is_neither_frozen_nor_running_is_lost() -> None:
    failing = {"FAILING": f'{{"checkpoint": {OUT_OF_MEMORY}, "unlock": {ILLEGAL_STATE}}}'}
    async with checkpoint_process(failing, COMMAND) as freezer:
        with pytest.raises(PrismError) as error:
            await freezer.freeze(PID, DEADLINE_S)
        assert (error.value.code, error.value.retry) == (ErrorCode.ENGINE_LOST, True)


async def test_a_process_that_cannot_be_thawed_is_lost() -> None:
    async with checkpoint_process({"FAILING": f'{{"restore": {OUT_OF_MEMORY}}}'}, COMMAND) as freezer:
        await freezer.freeze(PID, DEADLINE_S)
        with pytest.raises(PrismError) as error:
            await freezer.thaw(PID, DEADLINE_S)
        assert error.value.code is ErrorCode.ENGINE_LOST


@pytest.mark.parametrize(("pid", "deadline_s"), [(HANGING, 0.2), (DYING, DEADLINE_S)])
async def test_a_server_that_hangs_or_dies_is_replaced(pid: int, deadline_s: float) -> None:
    async with checkpoint_process({}, COMMAND) as freezer:
        (first,) = servers()
        with pytest.raises(PrismError) as error:
            await freezer.freeze(pid, deadline_s)
        assert error.value.code is ErrorCode.ENGINE_LOST
        await freezer.freeze(PID, DEADLINE_S)
        (second,) = servers()
        assert first.pid != second.pid


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this host has a GPU")
async def test_the_real_server_says_why_it_cannot_freeze_here(caplog: pytest.LogCaptureFixture) -> None:
    async with checkpoint_process({}) as freezer:
        with pytest.raises(PrismError, match="nothing can be frozen here: no NVIDIA driver") as error:
            await freezer.freeze(PID, DEADLINE_S)
        assert error.value.code is ErrorCode.UNSUPPORTED
    assert "no frozen tier" in caplog.text
