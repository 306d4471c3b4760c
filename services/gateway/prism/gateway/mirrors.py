"""Mirrors of buckets whose failure ends the gateway: one that follows no more tells old news for ever."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from prism.common.bus import Bus
from prism.common.mirror import BucketMirror
from prism.common.tasks import end_task

T = TypeVar("T")

READY_DEADLINE_S = 20.0


@asynccontextmanager
async def followed_bucket(
    tasks: asyncio.TaskGroup,
    bus: Bus,
    bucket: str,
    kind: type[T],
    *,
    pattern: str = ">",
    on_change: Callable[[str, T | None], None] | None = None,
) -> AsyncIterator[BucketMirror[T]]:
    """As `mirror_bucket`, by a task of `tasks`. Raises TimeoutError when the bucket could not be read within
    READY_DEADLINE_S seconds."""
    mirror = BucketMirror(kind, on_change)
    task = tasks.create_task(mirror.run(bus, bucket, pattern), name=f"mirror {bucket}")
    try:
        async with asyncio.timeout(READY_DEADLINE_S):
            await mirror.ready.wait()
        yield mirror
    finally:
        await end_task(task)
