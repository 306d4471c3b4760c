"""A lease has one holder, who may not know it yet."""

import nats.errors
import pytest

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.leases import LeaseBucket

KEY = "lease"


def leases(bus: Bus, holder: str) -> LeaseBucket:
    return LeaseBucket(bus, subjects.BUCKET_LEADER, holder.encode())


async def test_only_one_has_it_until_it_is_given_back(bus: Bus) -> None:
    first, second = leases(bus, "first"), leases(bus, "second")
    taken = await first.take(KEY)
    assert taken is not None
    assert await second.take(KEY) is None
    assert await second.own_revision(KEY) is None
    await second.give_back(KEY)
    assert await first.own_revision(KEY) == taken, "nobody gives back what another has"
    await first.give_back(KEY)
    after = await second.take(KEY)
    assert after is not None
    assert after > taken


async def test_whoever_has_it_without_knowing_takes_it_again(bus: Bus) -> None:
    taken = await leases(bus, "first").take(KEY)
    assert taken is not None
    again = await leases(bus, "first").take(KEY)
    assert again is not None
    assert again > taken


async def test_it_is_renewed_from_its_last_revision_only(bus: Bus) -> None:
    lease = leases(bus, "first")
    taken = await lease.take(KEY)
    assert taken is not None
    renewed = await lease.renew(KEY, taken)
    assert renewed is not None
    assert renewed > taken
    assert await lease.renew(KEY, taken) is None
    assert await lease.own_revision(KEY) == renewed


async def test_nothing_is_sent_while_the_bus_is_away(bus: Bus, fresh_nats: NatsServer) -> None:
    async with connect_bus(fresh_nats.url, name="gone") as gone:
        lease = leases(gone, "first")
    with pytest.raises(nats.errors.ConnectionClosedError):
        await lease.take(KEY)
    assert await leases(bus, "second").take(KEY) is not None
