"""A local copy of a KV bucket's keys under one pattern, kept up to date."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import nats.errors
import nats.js.errors
from nats.js.kv import KeyValue

from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.codec import decode
from prism.common.tasks import end_task

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECTION_CHECK_S = 0.5


class BucketMirror(Generic[T]):
    """Decoded values by key. `ready` is set once all that the bucket held at the start is here."""

    def __init__(self, kind: type[T], on_change: Callable[[str, T | None], None] | None) -> None:
        self.values: dict[str, T] = {}
        self.ready = asyncio.Event()
        self._kind = kind
        self._on_change = on_change

    def _apply(self, key: str, value: T | None) -> None:
        if value is None:
            self.values.pop(key, None)
        else:
            self.values[key] = value
        if self._on_change:
            self._on_change(key, value)

    def _take(self, entry: KeyValue.Entry) -> None:
        if entry.operation is not None:
            self._apply(entry.key, None)
            return
        try:
            self._apply(entry.key, decode(entry.value or b"", self._kind))
        except PrismError as error:
            log.error("key %s of %s is not readable: %s", entry.key, entry.bucket, error.message)

    def _complete(self, seen: set[str], *, expected: bool) -> bool:
        """All that the bucket held is here, unless nothing is and entries are `expected`."""
        if expected and not seen:
            return False
        # What was here before a re-watch and is gone from the bucket was deleted meanwhile.
        for key in set(self.values) - seen:
            self._apply(key, None)
        self.ready.set()
        return True

    async def _follow(self, bus: Bus, bucket: KeyValue, pattern: str) -> None:
        """Until the bus has been away: the server then knows the watch no more, and nats-py notices that
        only after its heartbeats (10 to 20 s)."""
        connection = bus.client.stats["reconnects"]
        watcher = await bucket.watch(pattern)
        seen: set[str] = set()
        complete = False
        try:
            while bus.client.stats["reconnects"] == connection:
                try:
                    entry = await watcher.updates(timeout=CONNECTION_CHECK_S)
                except nats.errors.TimeoutError:
                    continue
                if entry is None:
                    # nats-py's mark of the end can overtake entries that are sent or yet to be.
                    state = await watcher._sub.consumer_info()
                    held = bool(state.delivered.consumer_seq or state.num_pending)
                    complete = complete or self._complete(seen, expected=held)
                    continue
                seen.add(entry.key)
                self._take(entry)
                if entry.delta == 0:
                    complete = complete or self._complete(seen, expected=False)
        finally:
            try:
                await watcher.stop()
            except (nats.errors.Error, OSError, TimeoutError):
                log.debug("watch of %s ended while the bus was away", pattern)

    async def run(self, bus: Bus, bucket: str, pattern: str) -> None:
        """Follow the bucket until cancelled; a watch that breaks is set up again."""
        while True:
            try:
                await self._follow(bus, await bus.bucket(bucket), pattern)
            except (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError) as error:
                log.info("watch of %s broke (%s), setting it up again", bucket, error)
            await asyncio.sleep(0.5)


@asynccontextmanager
async def mirror_bucket(
    bus: Bus,
    bucket: str,
    kind: type[T],
    *,
    pattern: str = ">",
    on_change: Callable[[str, T | None], None] | None = None,
    deadline_s: float = 20.0,
    spawn: Callable[..., "asyncio.Task[None]"] = asyncio.create_task,
) -> AsyncIterator[BucketMirror[T]]:
    """A mirror of `bucket`, complete when this returns it, followed until the end of the `async with`.

    `on_change(key, value)` is called for each change, with None for a deleted key, before anything waits
    on the change sees it. `spawn` makes the task that follows: a task group's has its owner end, where
    following fails, rather than go on with old news.

    Raises TimeoutError when the bucket could not be read within `deadline_s` seconds.
    """
    mirror = BucketMirror(kind, on_change)
    task = spawn(mirror.run(bus, bucket, pattern), name=f"mirror {bucket}")
    try:
        async with asyncio.timeout(deadline_s):
            await mirror.ready.wait()
        yield mirror
    finally:
        await end_task(task)
