"""When an engine counts as stuck: it has requests, and has said nothing for too long.

A working engine speaks after every step, a chunk of a long prefill included, so its silence is no measure of
the requests' size.
"""


class StallWatch:
    """Judges silences beyond `limit_s`, looked at every `interval_s`. All times in seconds on one clock."""

    def __init__(self, limit_s: float, interval_s: float, now: float) -> None:
        self._limit_s = limit_s
        self._interval_s = interval_s
        self._now = now
        self._excused_until = now

    def looked(self, now: float) -> None:
        """The watch looks, at `now`. One that comes late was held up itself, and heard nobody meanwhile."""
        if now - self._now > 2 * self._interval_s + 1:
            self._excused_until = now
        self._now = now

    def silence_s(self, heard_at: float, working_since: float | None) -> float | None:
        """How long an engine has been silent while it had work since `working_since` (None: it has none), if
        that is too long; else None."""
        if working_since is None:
            return None
        silence_s = self._now - max(heard_at, working_since, self._excused_until)
        return silence_s if silence_s > self._limit_s else None
