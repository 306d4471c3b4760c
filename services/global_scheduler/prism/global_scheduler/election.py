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

from prism.common import subjects
from prism.common.bus import LEADER_TTL_S, Bus
from prism.common.leases import LEASE_ERRORS, LeaseBucket
from prism.common.messages.codec import encode
from prism.common.messages.placement import LeaderRecord
from prism.common.mirror import BucketMirror, mirror_bucket
from prism.common.tasks import end_task

log = logging.getLogger(__name__)

RENEW_S = LEADER_TTL_S / 3
MARGIN_S = LEADER_TTL_S / 6
POLL_S = LEADER_TTL_S / 10


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
        self._leases = LeaseBucket(bus, subjects.BUCKET_LEADER, encode(LeaderRecord(instance)))
        self._mirror: BucketMirror[LeaderRecord] | None = None

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
            except LEASE_ERRORS as error:
                log.debug("no lease: %s", error)
                self._leases.failed()
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
            revision = await self._leases.take(subjects.LEADER_KEY)
        if revision is None:
            return False
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
                    revision = await self._leases.renew(subjects.LEADER_KEY, self._revision)
            except LEASE_ERRORS as error:
                log.debug("lease not renewed: %s", error)
                self._leases.failed()
                await asyncio.sleep(min(max(left, 0.0), 0.05))
                continue
            if revision is not None:
                self._renewed(revision, began)
                return
            if not await self._still_own():
                self._step_down("another instance has the lease")

    async def _still_own(self) -> bool:
        """Whether the entry is ours all the same: a renewal went through whose answer was lost."""
        try:
            async with asyncio.timeout(RENEW_S):
                own = await self._leases.own_revision(subjects.LEADER_KEY)
        except LEASE_ERRORS:
            return True
        if own is not None:
            self._revision = own
        return own is not None

    async def _give_back(self) -> None:
        try:
            async with asyncio.timeout(RENEW_S):
                await self._leases.give_back(subjects.LEADER_KEY)
        except LEASE_ERRORS as error:
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
