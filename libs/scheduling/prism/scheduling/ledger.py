"""Bookkeeping of one device's memory: what is used was reserved before, and never more than the limit."""

import msgspec

from prism.common.errors import ErrorCode, PrismError


class Parts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bytes by purpose: model weights, KV-cache quota, and the fixed cost of an engine's process."""

    weights: int = 0
    kv: int = 0
    fixed: int = 0

    @property
    def total(self) -> int:
        """All three together."""
        return self.weights + self.kv + self.fixed

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(self.weights + other.weights, self.kv + other.kv, self.fixed + other.fixed)

    def __sub__(self, other: "Parts") -> "Parts":
        return Parts(self.weights - other.weights, self.kv - other.kv, self.fixed - other.fixed)

    @property
    def has_negative(self) -> bool:
        """Whether any part is below zero."""
        return min(self.weights, self.kv, self.fixed) < 0


class LedgerSnapshot(msgspec.Struct, frozen=True):
    """The ledger at one instant, in bytes."""

    limit_bytes: int
    reserved_bytes: int
    owners: dict[str, Parts]


class MemoryLedger:
    """Reservations of one device by owner. At every instant their sum is at most `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"a memory limit can't be negative: {limit_bytes}")
        self._limit = limit_bytes
        self._owners: dict[str, Parts] = {}
        self._reserved = 0

    @property
    def limit_bytes(self) -> int:
        """What may be reserved in all."""
        return self._limit

    @property
    def reserved_bytes(self) -> int:
        """What is reserved now."""
        return self._reserved

    @property
    def free_bytes(self) -> int:
        """What can still be reserved."""
        return self._limit - self._reserved

    def held(self, owner: str) -> Parts:
        """What `owner` has reserved; nothing if it is not known."""
        return self._owners.get(owner, Parts())

    def reserve(self, owner: str, *, weights: int = 0, kv: int = 0, fixed: int = 0) -> Parts:
        """Add to what `owner` holds, all of it or nothing, and return what it holds then.

        Raises PrismError(out_of_memory), which names what is held by whom, when it does not fit.
        """
        return self._set(owner, self.held(owner) + _checked(Parts(weights, kv, fixed)))

    def resize(self, owner: str, *, weights: int = 0, kv: int = 0, fixed: int = 0) -> Parts:
        """Have `owner` hold exactly this, more or less than before; raises as `reserve` does."""
        return self._set(owner, _checked(Parts(weights, kv, fixed)))

    def shrink(self, owner: str, *, weights: int = 0, kv: int = 0, fixed: int = 0) -> Parts:
        """Give back part of what `owner` holds, and return what is left; ValueError past what it holds."""
        held = self.held(owner)
        left = held - _checked(Parts(weights, kv, fixed))
        if left.has_negative:
            raise ValueError(f"{owner} holds {held}, less than it gives back")
        return self._set(owner, left)

    def release(self, owner: str) -> Parts:
        """Give back all that `owner` holds, and return what that was."""
        held = self.held(owner)
        self._set(owner, Parts())
        return held

    def snapshot(self) -> LedgerSnapshot:
        """Everything, as of now."""
        return LedgerSnapshot(self._limit, self._reserved, dict(self._owners))

    def _set(self, owner: str, parts: Parts) -> Parts:
        more = parts.total - self.held(owner).total
        if more > self.free_bytes:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{owner} needs {_mb(more)} more to hold {_described(parts)}; "
                f"{_mb(self.free_bytes)} of {_mb(self._limit)} are free; held: {self._holders()}",
                retry=True,
            )
        self._reserved += more
        if parts.total:
            self._owners[owner] = parts
        else:
            self._owners.pop(owner, None)
        return parts

    def _holders(self) -> str:
        by_size = sorted(self._owners.items(), key=lambda item: -item[1].total)
        return "; ".join(f"{owner} {_described(parts)}" for owner, parts in by_size) or "nothing"


def _checked(parts: Parts) -> Parts:
    if parts.has_negative:
        raise ValueError(f"bytes can't be negative: {parts}")
    return parts


def _described(parts: Parts) -> str:
    named = {"weights": parts.weights, "KV": parts.kv, "fixed": parts.fixed}
    listed = ", ".join(f"{name} {_mb(nbytes)}" for name, nbytes in named.items() if nbytes)
    return f"{_mb(parts.total)} ({listed or 'nothing'})"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
