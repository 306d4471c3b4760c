"""Single flight: however many ask for the same thing at once, it is made once, and all see the progress."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from prism.model_store.images import ImageKey

OnProgress = Callable[[int, int], None]


@dataclass(eq=False)
class Flight:
    """One making under way. `tell` passes its progress to all who wait for it."""

    task: asyncio.Task[None] | None = None
    listeners: list[OnProgress] = field(default_factory=list)

    def tell(self, done_bytes: int, total_bytes: int) -> None:
        """Pass on progress."""
        for listener in list(self.listeners):
            listener(done_bytes, total_bytes)


class Flights:
    """All makings under way, by what is made. Use as `async with`: its end cancels them."""

    def __init__(self) -> None:
        self._flights: dict[ImageKey, Flight] = {}

    async def __aenter__(self) -> "Flights":
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [flight.task for flight in self._flights.values() if flight.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def join(
        self, key: ImageKey, make: Callable[[Flight], Coroutine[Any, Any, None]], on_progress: OnProgress
    ) -> None:
        """Wait for the making of `key`, started by the first who asks. Raises what the making raises.

        One who is cancelled while waiting leaves; when the last one leaves, the making is cancelled.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight()
            flight.task = asyncio.create_task(self._run(key, flight, make), name=f"stage {key.fingerprint}")
        assert flight.task is not None
        task = flight.task
        flight.listeners.append(on_progress)
        try:
            await asyncio.shield(task)
        finally:
            flight.listeners.remove(on_progress)
            if not flight.listeners and not task.done():
                task.cancel()
                # Whoever asks next starts afresh, rather than joining one that is ending.
                if self._flights.get(key) is flight:
                    del self._flights[key]
                await asyncio.gather(task, return_exceptions=True)

    async def _run(
        self, key: ImageKey, flight: Flight, make: Callable[[Flight], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await make(flight)
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
