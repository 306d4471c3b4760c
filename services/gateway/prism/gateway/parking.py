"""Requests that wait for their model to be served somewhere."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prism.common.errors import ErrorCode, PrismError


class Place:
    """One parked request's place."""

    def __init__(self, lot: "_ModelLot", since: float) -> None:
        self._lot = lot
        self.since = since

    async def woken(self, timeout_s: float) -> None:
        """Wait for the next wake of the model, at most `timeout_s` seconds."""
        wake = self._lot.wake
        try:
            async with asyncio.timeout(timeout_s):
                await wake.wait()
        except TimeoutError:
            return


class _ModelLot:
    def __init__(self) -> None:
        self.places: dict[Place, None] = {}
        self.capped = 0
        self.wake = asyncio.Event()


class Parking:
    """Parked requests by model, with caps per model and in all on those that have not begun.

    `clock` gives seconds; `on_change(model)` is called after each arrival and departure; `obstacle(model)`
    says why no request wakes a model as things are, None for nothing known: who waited in vain is told.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        per_model: int,
        total: int,
        on_change: Callable[[str], None] = lambda model: None,
        obstacle: Callable[[str], str | None] = lambda model: None,
    ) -> None:
        self._clock = clock
        self._per_model = per_model
        self._total = total
        self._on_change = on_change
        self._obstacle = obstacle
        self._lots: dict[str, _ModelLot] = {}
        self._capped = 0

    @contextmanager
    def place(self, model: str, since: float | None = None, *, begun: bool = False) -> Iterator[Place]:
        """Park a request of `model`, which waits since `since` (now), until the block ends. One that has
        `begun` on a worker was let in long ago: no cap holds for it, and it takes nobody's place.

        Raises PrismError(overloaded) beyond a cap, and what the block raises: a deadline_exceeded with what
        the model lacks.
        """
        if not begun:
            self._refuse_beyond_caps(model)
        lot = self._lots.setdefault(model, _ModelLot())
        place = Place(lot, self._clock() if since is None else since)
        capped = int(not begun)
        lot.places[place] = None
        lot.capped += capped
        self._capped += capped
        self._on_change(model)
        try:
            yield place
        except PrismError as error:
            why = self._obstacle(model) if error.code is ErrorCode.DEADLINE_EXCEEDED else None
            if why is None:
                raise
            message = f"{error.message}. The scheduler: {why}"
            raise PrismError(error.code, message, retry=error.retry, param=error.param) from error
        finally:
            del lot.places[place]
            lot.capped -= capped
            self._capped -= capped
            if not lot.places:
                del self._lots[model]
            self._on_change(model)

    def _refuse_beyond_caps(self, model: str) -> None:
        if self._capped >= self._total:
            raise PrismError(
                ErrorCode.OVERLOADED,
                f"{self._capped} requests wait for models to wake, the most that this gateway holds",
                retry=True,
            )
        lot = self._lots.get(model)
        if (lot.capped if lot else 0) >= self._per_model:
            raise PrismError(
                ErrorCode.OVERLOADED,
                f"{self._per_model} requests wait for {model!r} to wake, the most that this gateway holds",
                retry=True,
                param="model",
            )

    def models(self) -> list[str]:
        """Models with parked requests."""
        return list(self._lots)

    def count(self, model: str) -> int:
        """Requests parked for `model`."""
        lot = self._lots.get(model)
        return len(lot.places) if lot else 0

    def oldest_s(self, model: str) -> float:
        """How long the one of them that waits longest has waited."""
        lot = self._lots.get(model)
        return self._clock() - min(place.since for place in lot.places) if lot else 0.0

    def wake(self, model: str) -> None:
        """One event for all who wait for `model`: they look again whether they can go."""
        lot = self._lots.get(model)
        if lot is not None:
            lot.wake.set()
            lot.wake = asyncio.Event()
