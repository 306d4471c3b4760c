"""The worker's side of its lender: a real process, over a stand-in for the driver."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prism.common.memfd import memfd_of
from prism.gpu_worker.lent_bus.borrowing import Buses
from prism.gpu_worker.lent_bus.lender_process import lent_bus

COMMAND = (sys.executable, "-m", "tests.gpu_worker.lent_bus.lender_process")
DEADLINE_S = 30.0


def lenders() -> list[psutil.Process]:
    """Those of this process."""
    return [child for child in psutil.Process().children() if "lender_process" in str(child.cmdline())]


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await asyncio.to_thread(happened):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_bus_is_lent_but_while_the_worker_needs_it_and_the_lender_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism.gpu_worker.lent_bus.borrowing.ANSWER_DEADLINE_S", DEADLINE_S)
    buses = Buses(tmp_path / "buses", ["GPU-0"])

    def lent() -> bool:
        turns = buses.borrow()
        for turn in turns:
            turn.finish()
        return bool(turns)

    async with lent_bus(tmp_path / "buses" / "GPU-1", {}, COMMAND) as bus:
        buses.offer(memfd_of("image", bytes(5000)), 5000)
        await until(lent)
        async with bus:
            await until(lambda: not lent())
        await until(lent)
        assert len(lenders()) == 1
    assert not lenders()
    assert not list((tmp_path / "buses").iterdir())
    assert not lent()


async def test_a_worker_does_without_a_lender_that_does_not_start(tmp_path: Path) -> None:
    async with lent_bus(tmp_path / "GPU-1", {}, (sys.executable, "-c", "raise SystemExit(1)")) as bus:
        async with bus:
            entered = asyncio.create_task(bus.__aenter__())
            await asyncio.sleep(0)
            assert not entered.done(), "one wake at a time"
        await entered
        await bus.__aexit__(None, None, None)
