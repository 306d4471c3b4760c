"""How much KV memory each engine of a GPU may hold: follows demand, shrinks before it grows.

The pool is physical memory less weights, contexts and the slack that an activation needs. A quota is a
promise: what is promised in all never exceeds the pool, so a shrunk quota counts as what it was until its
engine confirms, and only then is the room there for others.

Who gets what, in this order, as far as the pool goes:

1. everybody's floor, higher priorities first;
2. by priority, higher first: what its running requests will take, then what its queued ones want as well.
   Within a priority, shares are max-min fair: nobody has more than another that could use more. So a higher
   priority's queue can push out a lower one's running requests, but never its own kind's: among equals, room
   comes from idle memory and from requests that end;
3. what it has already: a quota is not lowered because it is idle, but because somebody wants it;
4. some room to grow for whoever grows, so that it need not ask again at once.

With nothing changed, a plan that was carried out is followed by an empty one.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import msgspec

GROWTH_SHARE = 0.25
"""Whoever grows gets so much more than it wants, if nobody else wants it."""


class QuotaHolder(msgspec.Struct, frozen=True):
    """One engine's KV memory, in bytes.

    `quota_bytes` is what is promised to it and confirmed; `used_bytes` what requests hold of it now;
    `committed_bytes` what its running requests will probably hold in the end, `wanted_bytes` the same with
    those that are queued. It never gets less than
    `floor_bytes` while there is enough for all floors, and never more than `cap_bytes`. Quotas are raised and
    lowered to multiples of `granularity`.
    """

    model: str
    quota_bytes: int
    used_bytes: int = 0
    committed_bytes: int = 0
    wanted_bytes: int = 0
    floor_bytes: int = 0
    cap_bytes: int = 1 << 62
    granularity: int = 1
    priority: int = 0

    @property
    def needed_bytes(self) -> int:
        """Below this, a lower quota would cost its running requests something."""
        needed = max(self.used_bytes, self.committed_bytes, self.floor_bytes)
        return min(_up(needed, self.granularity), self.cap_bytes)

    @property
    def spare_bytes(self) -> int:
        """What it could give away without a running request noticing."""
        return max(0, self.quota_bytes - self.needed_bytes)


class QuotaPlan(msgspec.Struct, frozen=True):
    """Quotas: `targets` is what each should have; `shrink` to what to lower now; `grow` to what may be raised
    now, all at once and whatever becomes of the shrinks."""

    targets: dict[str, int]
    shrink: dict[str, int]
    grow: dict[str, int]


def arbitrate(pool_bytes: int, holders: Sequence[QuotaHolder]) -> QuotaPlan:
    """The next steps towards what everybody should have. O(n) in the number of holders, times the bits of a
    size."""
    holders = sorted(holders, key=lambda holder: (-holder.priority, holder.model))
    targets = _targets(max(0, pool_bytes), holders)
    shrink = {
        holder.model: targets[holder.model]
        for holder in holders
        if targets[holder.model] < holder.quota_bytes
    }
    has = [holder.quota_bytes for holder in holders]
    free = pool_bytes - sum(has)
    for members in _classes(holders):
        # What can't be had in full yet is shared out as everything is.
        given = _raise(free, has, members, lambda place: targets[holders[place].model])
        free -= given
    grow = {}
    for holder, nbytes in zip(holders, has, strict=True):
        raised = _down(nbytes, holder.granularity)
        if raised > holder.quota_bytes:
            grow[holder.model] = raised
    return QuotaPlan(targets, shrink, grow)


def _targets(pool: int, holders: Sequence[QuotaHolder]) -> dict[str, int]:
    has = [0] * len(holders)
    left = pool

    def give(places: Sequence[int], upto: Callable[[QuotaHolder], int]) -> None:
        nonlocal left
        left -= _raise(left, has, places, lambda place: min(upto(holders[place]), holders[place].cap_bytes))

    classes = _classes(holders)
    for members in classes:
        give(members, lambda holder: holder.floor_bytes)
    for members in classes:
        give(members, lambda holder: holder.needed_bytes)
        give(members, lambda holder: _up(holder.wanted_bytes, holder.granularity))
    growing = [place for place, holder in enumerate(holders) if has[place] > holder.quota_bytes]
    for members in classes:
        give(members, lambda holder: holder.quota_bytes)
    for place in growing:
        roomy = int(has[place] * (1 + GROWTH_SHARE))
        give([place], lambda holder: roomy)  # noqa: B023  # used at once
    return {
        # A quota that stays stays as it is, whatever its size.
        holder.model: nbytes if nbytes == holder.quota_bytes else _down(nbytes, holder.granularity)
        for holder, nbytes in zip(holders, has, strict=True)
    }


def _classes(holders: Sequence[QuotaHolder]) -> list[list[int]]:
    """Places of holders of equal priority, the highest first, as `holders` are."""
    grouped = groupby(range(len(holders)), key=lambda place: holders[place].priority)
    return [list(places) for _, places in grouped]


def _raise(amount: int, has: list[int], places: Sequence[int], upto: Callable[[int], int]) -> int:
    """Raise what `places` have to what `upto` says, with at most `amount` in all, the lowest first: max-min
    fair in what each has then. Returns what that took."""
    tops = {place: max(has[place], upto(place)) for place in places}

    def takes(level: int) -> int:
        return sum(max(0, min(top, level) - has[place]) for place, top in tops.items())

    low, high = 0, max(tops.values(), default=0)
    if amount <= 0 or not high:
        return 0
    if takes(high) > amount:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if takes(middle) <= amount else (low, middle)
        high = low
    taken = takes(high)
    for place, top in tops.items():
        has[place] = max(has[place], min(top, high))
    return taken


def _up(nbytes: int, granularity: int) -> int:
    return -(-nbytes // granularity) * granularity


def _down(nbytes: int, granularity: int) -> int:
    return nbytes // granularity * granularity
