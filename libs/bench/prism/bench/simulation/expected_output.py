"""How many tokens a model's answers probably have: a quantile of its recent ones."""

from collections import deque


class RecentOutputs:
    """Lengths of the last `remembered` answers; `expected` is their `quantile`, None before there was any."""

    __slots__ = ("_lengths", "_quantile", "_since", "expected")

    REFRESH_EVERY = 16

    def __init__(self, quantile: float = 0.9, remembered: int = 128) -> None:
        self._lengths: deque[int] = deque(maxlen=remembered)
        self._quantile = quantile
        self._since = 0
        self.expected: int | None = None

    def add(self, tokens: int) -> None:
        """An answer is complete."""
        self._lengths.append(tokens)
        self._since += 1
        if self._since >= self.REFRESH_EVERY or len(self._lengths) < self.REFRESH_EVERY:
            self._since = 0
            ordered = sorted(self._lengths)
            self.expected = ordered[min(len(ordered) - 1, int(self._quantile * len(ordered)))]
