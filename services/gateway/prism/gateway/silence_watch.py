"""When a worker's silence means that it is gone, and when only that this gateway didn't listen."""

from collections.abc import Callable

from prism.gateway.fleet import Fleet

HELD_UP_S = 1.0
"""Lateness beyond which this process was held up itself (stopped, its machine paused, no processor): what
came meanwhile waits in its socket, and is read before anybody is judged by it."""


class SilenceWatch:
    """Looks at `fleet` every `interval_s` seconds of `clock`."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float], interval_s: float) -> None:
        self._fleet = fleet
        self._clock = clock
        self._interval_s = interval_s
        self._looked_at = clock()

    def look(self, *, connected: bool) -> list[str]:
        """Forget the workers that have gone silent, and name them. Off the bus (not `connected`) and at a
        look that comes late, everybody's silence begins anew instead."""
        now = self._clock()
        late_s = now - self._looked_at - self._interval_s
        self._looked_at = now
        if not connected or late_s > HELD_UP_S:
            self._fleet.excuse_silence()
            return []
        return self._fleet.drop_silent()
