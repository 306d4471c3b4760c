"""Ending tasks for certain."""

import asyncio
from typing import Any

CANCEL_AGAIN_S = 0.2


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel `task` and wait until it has ended; what it ended with stays in the task.

    Cancels again and again: `asyncio.wait_for` of Python 3.11, which nats-py is full of, forgets a
    cancellation that comes in the same moment as the result that it waits for.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
