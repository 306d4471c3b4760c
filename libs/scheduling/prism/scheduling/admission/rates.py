"""How fast a model prefills and decodes, measured from its engine's steps while it serves.

Outliers (a garbage collection, a page fault, another engine's burst) come singly and last many times longer,
so each figure is a median over the last steps, not a mean.
"""

from collections import deque
from collections.abc import Sequence
from math import inf, isfinite
from statistics import median
from typing import NamedTuple

import numpy as np

REMEMBERED = 31
ENOUGH = 3
REMEMBERED_OF_A_SIZE = 9
FORGOTTEN_AFTER = 500
"""After so many passes without one of a size, what was seen of that size is forgotten: it may have been while
others had the GPU."""
FIT_SPREAD = 4.0
"""A line is fitted only through passes of which some are so many times larger than others."""
LEAST_TOKEN_SHARE = 0.25
"""Of the time of the passes with the least time a token, what the tokens take at least. The rest is taken to
be fixed until larger passes tell: a pass that is bound by launching kernels takes the same for 100 tokens as
for 500, and only whoever lets more prompts go together finds out."""


class _Pass(NamedTuple):
    number: int
    tokens: float
    seconds: float


class PrefillRate:
    """Seconds of a pass of prefill = fixed + tokens / rate.

    One observation is one pass: the tokens, less those that were cached, of all prompts whose first tokens
    came in the same step, and the time from their turn to that step. So bursts teach what a token costs, and
    single prompts what a pass costs. Passes of each size (powers of two) are remembered apart, or hundreds of
    single prompts would push out the one burst that tells them apart.

    The slope is Theil and Sen's, the median of the slopes between passes of different sizes; the fixed part
    is the median of what that leaves of the last passes. Until sizes differ enough nobody knows the slope,
    and LEAST_TOKEN_SHARE is assumed: that errs towards letting too many prompts go at once, by a factor of
    1 / LEAST_TOKEN_SHARE at most, and that very pass corrects it. An error the other way would last: prompts
    that are never let go together never show that they could be. So a line with a fixed part below 0, as one
    through large passes of a time when others had the GPU too, is drawn again through the more recent half.
    """

    def __init__(self) -> None:
        self._count = 0
        self._recent: deque[_Pass] = deque(maxlen=REMEMBERED)
        self._by_size: dict[int, deque[_Pass]] = {}
        self._token_s = 0.0
        self._fixed_s = 0.0
        self._stale = False

    def observe(self, tokens: int, seconds: float, passes: int = 1) -> None:
        """So many tokens took so long, in so many passes. Impossible observations are left out."""
        if tokens > 0 and passes > 0 and 0 < seconds < inf and isfinite(seconds):
            self._count += 1
            seen = _Pass(self._count, tokens / passes, seconds / passes)
            self._recent.append(seen)
            of_size = self._by_size.setdefault(_size(seen), deque(maxlen=REMEMBERED_OF_A_SIZE))
            of_size.append(seen)
            self._stale = True

    @property
    def known(self) -> bool:
        """Whether enough passes were seen."""
        return len(self._recent) >= ENOUGH

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second beyond the fixed part, infinite before enough passes were seen."""
        self._fit()
        return 1.0 / self._token_s if self._token_s else inf

    @property
    def fixed_s(self) -> float:
        """Seconds that any pass takes, however short."""
        self._fit()
        return self._fixed_s

    @property
    def reached_tokens_per_s(self) -> float:
        """Tokens a second that the last passes reached, the fixed part included; infinite before enough."""
        if not self.known:
            return inf
        return 1.0 / median(each.seconds / each.tokens for each in self._recent)

    def _fit(self) -> None:
        if not self._stale or not self.known:
            return
        self._stale = False
        for size, of_size in list(self._by_size.items()):
            if of_size[-1].number <= self._count - FORGOTTEN_AFTER:
                del self._by_size[size]
        seen = sorted(each for of_size in self._by_size.values() for each in of_size)
        token_s = _token_s(seen)
        fixed_s = self._left_by(token_s)
        if fixed_s < 0 and _spread(half := seen[len(seen) // 2 :]):
            token_s = _token_s(half)
            fixed_s = self._left_by(token_s)
        if fixed_s < 0:
            fixed_s, token_s = 0.0, 1.0 / self.reached_tokens_per_s
        self._fixed_s, self._token_s = fixed_s, token_s

    def _left_by(self, token_s: float) -> float:
        return median(each.seconds - token_s * each.tokens for each in self._recent)


def _size(seen: _Pass) -> int:
    return int(seen.tokens).bit_length()


def _spread(seen: Sequence[_Pass]) -> bool:
    tokens = [each.tokens for each in seen]
    return max(tokens) >= FIT_SPREAD * min(tokens)


def _token_s(seen: Sequence[_Pass]) -> float:
    """Seconds a token: the median slope, or where sizes differ too little the least share."""
    by_size: dict[int, list[float]] = {}
    for each in seen:
        by_size.setdefault(_size(each), []).append(each.seconds / each.tokens)
    least_s = LEAST_TOKEN_SHARE * min(median(of_size) for of_size in by_size.values())
    if not _spread(seen):
        return least_s
    rows = np.array(seen)
    tokens, seconds = rows[:, 1], rows[:, 2]
    first, second = np.triu_indices(len(rows), 1)
    apart = tokens[second] - tokens[first]
    first, second, apart = first[apart != 0], second[apart != 0], apart[apart != 0]
    return max(least_s, float(np.median((seconds[second] - seconds[first]) / apart)))


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
