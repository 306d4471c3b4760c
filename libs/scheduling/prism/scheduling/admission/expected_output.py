"""How many tokens a model's requests probably generate, learned from those that finished lately."""

from bisect import bisect_left, insort
from collections import deque


class ExpectedOutput:
    """A quantile of the last `remembered` outputs of one model; unknown before `enough` of them."""

    def __init__(self, quantile: float = 0.9, remembered: int = 256, enough: int = 16) -> None:
        if not 0 < quantile <= 1:
            raise ValueError(f"a quantile lies above 0 and up to 1: {quantile}")
        if not 0 < enough <= remembered:
            raise ValueError(f"{enough} outputs can't be enough of {remembered}")
        self._quantile = quantile
        self._remembered = remembered
        self._enough = enough
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def finished(self, tokens: int) -> None:
        """A request ended by itself after so many tokens. (One that was cancelled says nothing.)"""
        self._recent.append(tokens)
        insort(self._sorted, tokens)
        if len(self._recent) > self._remembered:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def tokens(self, max_new_tokens: int) -> int | None:
        """What a request that may generate `max_new_tokens` probably does, None before enough is known."""
        count = len(self._sorted)
        if count < self._enough:
            return None
        return min(max_new_tokens, self._sorted[min(count - 1, int(self._quantile * count))])

    def remaining(self, max_new_tokens: int, generated: int) -> int:
        """What a running request that has generated so many will probably still generate: at least one
        token, and all that it may once it has outlived the expectation or nothing is known."""
        expected = self.tokens(max_new_tokens)
        if expected is None or generated >= expected:
            return max(0, max_new_tokens - generated)
        return expected - generated
