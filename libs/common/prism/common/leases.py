"""Leases: entries of a KV bucket that expire unless they are written again.

Making an entry that is not there is atomic, and so is replacing one of a known revision. So a lease has one
holder as long as the bus keeps its state. An answer that was lost on the way may have made or renewed one
all the same; whoever finds an entry there therefore looks whether it is its own.
"""

import nats.errors
import nats.js.errors
from nats.js.kv import KeyValue

from prism.common.bus import Bus
from prism.common.errors import PrismError

LEASE_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError, PrismError)
"""What the methods of `LeaseBucket` raise when the bus is away, doesn't answer or refuses."""


class LeaseBucket:
    """The leases of one bucket as one holder sees them. `record` is what its entries hold: it must differ
    from all others'. None of the methods waits longer than the bus does; callers have deadlines."""

    def __init__(self, bus: Bus, bucket: str, record: bytes) -> None:
        self.record = record
        self._bus = bus
        self._name = bucket
        self._bucket: KeyValue | None = None

    async def take(self, key: str) -> int | None:
        """Make the lease `key` if nobody has it: the revision of the entry that is ours now, else None."""
        bucket = await self.bucket()
        try:
            return int(await bucket.create(key, self.record))
        except nats.js.errors.KeyWrongLastSequenceError:
            own = await self.own_revision(key)
            return None if own is None else int(await bucket.update(key, self.record, last=own))

    async def renew(self, key: str, revision: int) -> int | None:
        """Write the entry of that revision again: its new one, None when it is not the last any more."""
        try:
            return int(await (await self.bucket()).update(key, self.record, last=revision))
        except nats.js.errors.KeyWrongLastSequenceError:
            return None

    async def own_revision(self, key: str) -> int | None:
        """The revision of the entry if it is ours, even if we never heard that it was made."""
        try:
            entry = await (await self.bucket()).get(key)
        except nats.js.errors.KeyNotFoundError:
            return None
        return int(entry.revision) if entry.value == self.record else None

    async def give_back(self, key: str) -> None:
        """Let others have it at once, if it is ours."""
        own = await self.own_revision(key)
        if own is not None:
            await (await self.bucket()).delete(key, last=own)

    def failed(self) -> None:
        """Look the bucket up anew the next time: what was known of it may be gone with the bus's state."""
        self._bucket = None

    async def bucket(self) -> KeyValue:
        """The bucket itself. Raises ConnectionClosedError while the bus is away: what is published then would
        be sent after its return, when it means nothing."""
        if not self._bus.client.is_connected:
            raise nats.errors.ConnectionClosedError
        if self._bucket is None:
            self._bucket = await self._bus.bucket(self._name)
        return self._bucket
