"""How children end: by themselves when their stdin does, else killed."""

import asyncio
import signal
import sys

import pytest

from prism.gpu_worker.child_process import end_child

pytestmark = pytest.mark.core

GRACE_S = 20.0
SERVES = "import sys; print('ready', flush=True); sys.stdin.read()"
DEAF = "import time; print('ready', flush=True); time.sleep(1000)"


async def child(program: str) -> asyncio.subprocess.Process:
    """One that has begun."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("program", "grace_s", "status"),
    [(SERVES, GRACE_S, 0), (SERVES, 0.0, -signal.SIGKILL), (DEAF, 0.1, -signal.SIGKILL)],
)
async def test_a_child_has_its_time_to_end(program: str, grace_s: float, status: int) -> None:
    process = await child(program)
    await end_child(process, grace_s)
    assert process.returncode == status


async def test_a_child_that_has_ended_is_ended_again() -> None:
    process = await child("print('ready')")
    await process.wait()
    await end_child(process, GRACE_S)
    assert process.returncode == 0


async def test_who_does_not_wait_any_longer_leaves_no_child() -> None:
    process = await child(DEAF)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await end_child(process, GRACE_S)
    assert process.returncode == -signal.SIGKILL
