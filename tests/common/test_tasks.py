"""Ending tasks for certain, even those that lose a cancellation."""

import asyncio

import pytest

from prism.common.tasks import end_task

pytestmark = pytest.mark.core


async def test_a_task_that_loses_its_first_cancellation_is_ended_all_the_same() -> None:
    losses = 0

    async def stubborn() -> None:
        nonlocal losses
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            losses += 1
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.wait([task], timeout=0)
    async with asyncio.timeout(5):
        await end_task(task)
    assert task.cancelled()
    assert losses == 1


async def test_a_task_that_has_ended_keeps_its_result() -> None:
    async def quick() -> int:
        return 7

    task = asyncio.create_task(quick())
    await task
    await end_task(task)
    assert task.result() == 7
