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
    """The ledger at one instant."""

    limit: int
    reserved: int
    owners: dict[str, Parts]


class MemoryLedger:
    """Reservations of one device by owner. At every instant their sum is at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"a memory limit can't be negative: {limit}")
        self._limit = limit
        self._owners: dict[str, Parts] = {}
        self._reserved = 0

    @property
    def limit(self) -> int:
        """Bytes that may be reserved in all."""
        return self._limit

    @property
    def reserved(self) -> int:
        """Bytes reserved now."""
        return self._reserved

    @property
    def free(self) -> int:
        """Bytes that can still be reserved."""
        return self._limit - self._reserved

    def held(self, owner: str) -> Parts:
        """What `owner` has reserved; nothing if it is not known."""
        return self._owners.get(owner, Parts())

    def reserve(self, owner: str, *, weights: int = 0, kv: int = 0, fixed: int = 0) -> Parts:
        """Add to what `owner` holds, all of it or nothing, and return what it holds then.

        Raises PrismError(out_of_memory), which names what is held by whom, when it does not fit.
        """
        more = _non_negative(weights, kv, fixed)
        if self._reserved + more.total > self._limit:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{owner} needs {_mb(more.total)} more ({_described(more)}), "
                f"{_mb(self.free)} of {_mb(self._limit)} are free; held: {self._holders()}",
                retry=True,
            )
        return self._set(owner, self.held(owner) + more)

    def shrink(self, owner: str, *, weights: int = 0, kv: int = 0, fixed: int = 0) -> Parts:
        """Give back part of what `owner` holds, and return what is left; ValueError past what it holds."""
        left = self.held(owner) - _non_negative(weights, kv, fixed)
        if left.has_negative:
            raise ValueError(f"{owner} holds {self.held(owner)}, less than it gives back")
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
        self._reserved += parts.total - self.held(owner).total
        if parts.total:
            self._owners[owner] = parts
        else:
            self._owners.pop(owner, None)
        return parts

    def _holders(self) -> str:
        by_size = sorted(self._owners.items(), key=lambda item: -item[1].total)
        return (
            "; ".join(f"{owner} {_mb(parts.total)} ({_described(parts)})" for owner, parts in by_size) or "-"
        )


def _non_negative(weights: int, kv: int, fixed: int) -> Parts:
    parts = Parts(weights, kv, fixed)
    if parts.has_negative:
        raise ValueError(f"bytes can't be negative: {parts}")
    return parts


def _described(parts: Parts) -> str:
    named = {"weights": parts.weights, "KV": parts.kv, "fixed": parts.fixed}
    return ", ".join(f"{name} {_mb(nbytes)}" for name, nbytes in named.items() if nbytes) or "nothing"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
