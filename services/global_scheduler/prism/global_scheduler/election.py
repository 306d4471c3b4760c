"""Who leads: a lease in a KV bucket whose entries expire.

The epoch of a leader is the revision that acquired the lease: it only ever grows, travels with each command,
and lets workers refuse the commands of a leader that does not know yet that it was replaced. A bus that loses
its state counts revisions anew; so an epoch is also above any that a worker has reported.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import nats.errors
import nats.js.errors
from nats.js.kv import KeyValue

from prism.common import subjects
from prism.common.bus import LEADER_TTL_S, Bus
from prism.common.errors import PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.placement import LeaderRecord
from prism.common.mirror import BucketMirror, mirror_bucket
from prism.common.tasks import end_task

log = logging.getLogger(__name__)

RENEW_S = LEADER_TTL_S / 3
MARGIN_S = LEADER_TTL_S / 6
POLL_S = LEADER_TTL_S / 10
_BUS_ERRORS = (nats.errors.Error, OSError, TimeoutError, PrismError)


class Election:
    """One candidate. `epoch` is above 0 while it leads; `on_change(epoch)` is called with each change.
    `seen_epoch()` gives the highest epoch that workers know of."""

    def __init__(
        self, bus: Bus, instance: str, on_change: Callable[[int], None], seen_epoch: Callable[[], int]
    ) -> None:
        self.instance = instance
        self.epoch = 0
        self._bus = bus
        self._on_change = on_change
        self._seen_epoch = seen_epoch
        self._revision = 0
        self._fresh_until = 0.0
        self._renounced = asyncio.Event()
        self._vacant = asyncio.Event()
        self._record = encode(LeaderRecord(instance))
        self._mirror: BucketMirror[LeaderRecord] | None = None
        self._kv: KeyValue | None = None

    @property
    def leading(self) -> bool:
        """Whether this instance holds a lease that cannot have expired yet."""
        return self.epoch > 0 and time.monotonic() < self._fresh_until

    @property
    def leader(self) -> str:
        """The instance that leads as far as known; empty if nobody does."""
        if self.epoch:
            return self.instance
        record = self._mirror.values.get(subjects.LEADER_KEY) if self._mirror else None
        return record.instance if record else ""

    def renounce(self, epoch: int, reason: str) -> None:
        """Stop leading at once, if `epoch` is still the one led in, and let others have the lease."""
        if self.epoch == epoch:
            self._step_down(reason)
            self._renounced.set()

    async def run(self) -> None:
        """Stand for election until cancelled; the bus may come and go."""

        def on_record(_key: str, record: LeaderRecord | None) -> None:
            if record is None:
                self._vacant.set()

        while True:
            try:
                async with mirror_bucket(
                    self._bus, subjects.BUCKET_LEADER, LeaderRecord, on_change=on_record
                ) as self._mirror:
                    await self._campaign()
            except TimeoutError:
                log.warning("the bus does not tell who leads; trying again")

    async def _campaign(self) -> None:
        while True:
            self._vacant.clear()
            try:
                if await self._acquire():
                    await self._lead()
                    continue
            except _BUS_ERRORS as error:
                log.debug("no lease: %s", error)
                self._kv = None
            # An expired entry makes no sound, so the lease is also tried for again and again.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._vacant.wait()

    async def release(self) -> None:
        """Stop leading and give the lease back, so that a standby need not wait for its end."""
        if self.epoch:
            self._step_down("ends")
            await self._give_back()

    async def _acquire(self) -> bool:
        began = time.monotonic()
        async with asyncio.timeout(RENEW_S):
            bucket = await self._bucket()
            try:
                revision = int(await bucket.create(subjects.LEADER_KEY, self._record))
            except nats.js.errors.KeyWrongLastSequenceError:
                own = await self._own_revision(bucket)
                if own is None:
                    return False
                revision = int(await bucket.update(subjects.LEADER_KEY, self._record, last=own))
        self._renewed(revision, began)
        self.epoch = max(revision, self._seen_epoch() + 1)
        self._renounced.clear()
        log.info("%s leads, epoch %d", self.instance, self.epoch)
        self._on_change(self.epoch)
        return True

    async def _lead(self) -> None:
        while self.epoch:
            try:
                async with asyncio.timeout(RENEW_S):
                    await self._renounced.wait()
            except TimeoutError:
                await self._renew()
            else:
                await self._give_back()
                await asyncio.sleep(POLL_S)

    async def _renew(self) -> None:
        """Renew the lease, trying until it may have expired; then, or when another has it, step down."""
        while self.epoch:
            began = time.monotonic()
            left = self._fresh_until - began
            if left <= 0:
                self._step_down("the lease could not be renewed in time")
                return
            try:
                async with asyncio.timeout(min(left, RENEW_S)):
                    bucket = await self._bucket()
                    revision = await bucket.update(subjects.LEADER_KEY, self._record, last=self._revision)
                    self._renewed(int(revision), began)
                    return
            except nats.js.errors.KeyWrongLastSequenceError:
                if not await self._still_own():
                    self._step_down("another instance has the lease")
            except _BUS_ERRORS as error:
                log.debug("lease not renewed: %s", error)
                self._kv = None
                await asyncio.sleep(min(max(left, 0.0), 0.05))

    async def _still_own(self) -> bool:
        """Whether the entry is ours all the same: a renewal went through whose answer was lost."""
        try:
            async with asyncio.timeout(RENEW_S):
                own = await self._own_revision(await self._bucket())
        except _BUS_ERRORS:
            return True
        if own is not None:
            self._revision = own
        return own is not None

    async def _own_revision(self, bucket: KeyValue) -> int | None:
        try:
            entry = await bucket.get(subjects.LEADER_KEY)
        except nats.js.errors.KeyNotFoundError:
            return None
        record = decode(entry.value or b"", LeaderRecord)
        return int(entry.revision) if record.instance == self.instance else None

    async def _bucket(self) -> KeyValue:
        if not self._bus.client.is_connected:
            # What is published now would be sent after the connection is back, when it means nothing.
            raise nats.errors.ConnectionClosedError
        if self._kv is None:
            self._kv = await self._bus.bucket(subjects.BUCKET_LEADER)
        return self._kv

    async def _give_back(self) -> None:
        try:
            async with asyncio.timeout(RENEW_S):
                await (await self._bucket()).delete(subjects.LEADER_KEY, last=self._revision)
        except _BUS_ERRORS as error:
            log.debug("lease not given back: %s", error)

    def _renewed(self, revision: int, began: float) -> None:
        self._revision = revision
        # The server counts from when it took the entry, which was after `began`.
        self._fresh_until = began + LEADER_TTL_S - MARGIN_S

    def _step_down(self, reason: str) -> None:
        log.warning("%s no longer leads: %s", self.instance, reason)
        self.epoch = 0
        self._on_change(0)


@asynccontextmanager
async def stand_for_election(
    bus: Bus,
    instance: str,
    on_change: Callable[[int], None],
    seen_epoch: Callable[[], int] = lambda: 0,
) -> AsyncIterator[Election]:
    """A candidate that runs until the end of the `async with`, and gives the lease back then."""
    election = Election(bus, instance, on_change, seen_epoch)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(election.run(), name="election")
        try:
            yield election
        finally:
            await end_task(task)
            await election.release()
