"""How fast a model prefills and decodes, measured from its engine's steps while it serves.

Outliers (a garbage collection, a page fault, another engine's burst) come singly and last many times longer,
so each figure is a median over the last steps, not a mean.
"""

from collections import deque
from math import inf, isfinite
from statistics import median

REMEMBERED = 31
ENOUGH = 3
FIT_SPREAD = 4.0
"""A line is fitted only through prompts of which some are so many times longer than others."""


class PrefillRate:
    """Seconds of a prefill = fixed + tokens / rate, by Theil and Sen: the median of the slopes between pairs
    of observations, and the median of what that leaves.

    One observation is one prompt, in however many chunks it went: all of its tokens, less those that were
    cached, and the time from its turn to its first token.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._tokens_per_s = inf
        self._fixed_s = 0.0
        self._stale = False

    def observe(self, tokens: int, seconds: float) -> None:
        """A prompt of so many tokens took so long. Impossible observations are left out."""
        if tokens > 0 and 0 < seconds < inf and isfinite(seconds):
            self._seen.append((tokens, seconds))
            self._stale = True

    @property
    def known(self) -> bool:
        """Whether enough prompts were seen."""
        return len(self._seen) >= ENOUGH

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, infinite before enough prompts were seen."""
        self._fit()
        return self._tokens_per_s

    @property
    def fixed_s(self) -> float:
        """Seconds that any prefill takes, however short."""
        self._fit()
        return self._fixed_s

    def _fit(self) -> None:
        if not self._stale or not self.known:
            return
        self._stale = False
        seen = sorted(self._seen)
        overall = median(seconds / tokens for tokens, seconds in seen)
        self._fixed_s, per_token = 0.0, overall
        if seen[-1][0] >= FIT_SPREAD * seen[0][0]:
            slopes = [
                (later_s - earlier_s) / (more - fewer)
                for index, (fewer, earlier_s) in enumerate(seen)
                for more, later_s in seen[index + 1 :]
                if more > fewer
            ]
            slope = median(slopes)
            fixed = median(seconds - slope * tokens for tokens, seconds in seen)
            if slope > 0 and fixed >= 0:
                self._fixed_s, per_token = fixed, slope
        self._tokens_per_s = 1 / per_token


class StepTime:
    """The time of one decode step: the median over the last ones."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=REMEMBERED)
        self._median: float | None = None

    def observe(self, seconds: float) -> None:
        """A step took so long."""
        if 0 < seconds < inf:
            self._seen.append(seconds)
            self._median = None

    @property
    def seconds(self) -> float | None:
        """None before enough steps were seen."""
        if len(self._seen) < ENOUGH:
            return None
        if self._median is None:
            self._median = median(self._seen)
        return self._median
