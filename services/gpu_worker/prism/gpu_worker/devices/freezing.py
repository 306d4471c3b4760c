"""The frozen tier: a dozing engine whose process gives up the last of its device memory, context included."""

import asyncio
from typing import Protocol

from prism.common.errors import ErrorCode, PrismError


class Freezer(Protocol):
    """Takes all device memory from a process that dozes, and gives it back. One call at a time a process."""

    def check(self) -> None:
        """Raises PrismError(unsupported) with the reason where nothing can be frozen."""
        ...

    async def freeze(self, pid: int, deadline_s: float) -> dict[str, float]:
        """Freeze the process; returns the seconds of each phase.

        Raises PrismError: engine_lost when the process can't go on, else it runs as before.
        """
        ...

    async def thaw(self, pid: int, deadline_s: float) -> dict[str, float]:
        """Have a frozen process run again; returns the seconds of each phase.

        Raises PrismError(engine_lost): the process can't go on.
        """
        ...


def can_freeze(freezer: Freezer) -> bool:
    """Whether anything can be frozen."""
    try:
        freezer.check()
    except PrismError:
        return False
    return True


class NoFreezer:
    """Freezes nothing, and says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def check(self) -> None:
        """Raises PrismError(unsupported)."""
        raise PrismError(ErrorCode.UNSUPPORTED, f"nothing can be frozen here: {self._reason}")

    async def freeze(self, pid: int, deadline_s: float) -> dict[str, float]:
        """Raises PrismError(unsupported)."""
        self.check()
        return {}

    async def thaw(self, pid: int, deadline_s: float) -> dict[str, float]:
        """Raises PrismError(unsupported)."""
        self.check()
        return {}


class SimulatedFreezer:
    """Takes as long as it is told to; simulated engines hold nothing more once they doze."""

    def __init__(self, freeze_s: float, thaw_s: float) -> None:
        self._freeze_s = freeze_s
        self._thaw_s = thaw_s

    def check(self) -> None:
        """Nothing stands against it."""

    async def freeze(self, pid: int, deadline_s: float) -> dict[str, float]:
        """Wait."""
        await asyncio.sleep(self._freeze_s)
        return {"checkpoint": self._freeze_s}

    async def thaw(self, pid: int, deadline_s: float) -> dict[str, float]:
        """Wait."""
        await asyncio.sleep(self._thaw_s)
        return {"restore": self._thaw_s}
