"""What a model was asked for lately: rates that fade, kept without a clock."""

import math

import msgspec

WINDOW_S = 60.0


class Traffic(msgspec.Struct, frozen=True, omit_defaults=True):
    """Rates per second over about the last WINDOW_S seconds, and how long ago the last request came
    (infinite: none was seen). `gap_s` is the usual time between two requests, None before there were two. A
    rate times `window_s` is the number of events that it stands for."""

    arrivals_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    last_arrival_s: float = math.inf
    gap_s: float | None = None
    window_s: float = WINDOW_S


class FadingRate:
    """Events a second; each fades with a time constant of `window_s` seconds."""

    __slots__ = ("_at", "_rate", "_window_s")

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._rate = 0.0
        self._at = 0.0

    def add(self, now: float, amount: float = 1.0) -> None:
        """`amount` at `now`, which never goes back."""
        gone_s = now - self._at
        if gone_s > 0.0:
            self._rate *= math.exp(-gone_s / self._window_s)
        self._rate += amount / self._window_s
        self._at = now

    def at(self, now: float) -> float:
        """The rate at `now`."""
        return self._rate * math.exp(-max(0.0, now - self._at) / self._window_s)


class TrafficWindow:
    """One model's traffic. Times are on the caller's clock and never go back.

    A model that was first asked for less than the window ago has not filled it: its rates are over the time
    since then, SHORTEST_S at least.
    """

    __slots__ = ("_arrivals", "_first", "_gap_s", "_last", "_output", "_prompt", "_window_s")

    GAP_WEIGHT = 0.2
    SHORTEST_S = 10.0

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._arrivals = FadingRate(window_s)
        self._prompt = FadingRate(window_s)
        self._output = FadingRate(window_s)
        self._window_s = window_s
        self._first = math.inf
        self._last = -math.inf
        self._gap_s: float | None = None

    def arrived(self, now: float, prompt_tokens: int, requests: float = 1.0) -> None:
        """A request came, or so many at once with `prompt_tokens` in all."""
        if self._last == -math.inf:
            self._first = now
        else:
            gap = now - self._last
            known = self._gap_s
            self._gap_s = gap if known is None else known + self.GAP_WEIGHT * (gap - known)
        self._last = now
        self._arrivals.add(now, requests)
        self._prompt.add(now, prompt_tokens)

    def generated(self, now: float, tokens: int) -> None:
        """Tokens were generated."""
        self._output.add(now, tokens)

    def at(self, now: float) -> Traffic:
        """All of it as of `now`."""
        seen_s = max(self.SHORTEST_S, now - self._first) if self._first < math.inf else math.inf
        filled = 1.0 - math.exp(-seen_s / self._window_s)
        return Traffic(
            self._arrivals.at(now) / filled,
            self._prompt.at(now) / filled,
            self._output.at(now) / filled,
            now - self._last,
            self._gap_s,
            filled * self._window_s,
        )
