"""Stop strings in a stream of text, wherever its chunks are cut."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`stop` was found; it begins at `start`, counted in characters from the beginning of the whole text."""

    stop: str
    start: int


def find_stop(text: str, stops: Sequence[str]) -> StopMatch | None:
    """The match in `text` that is complete first; of several that end together, the longest.

    This is the match at which a generation that is looked at after every character would stop, so it does
    not depend on how the text came.
    """
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    if not found:
        return None
    _, start, stop = min(found)
    return StopMatch(stop, start)


class StopStrings:
    """Lets text through up to the first stop string. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._passed = 0
        self.match: StopMatch | None = None

    def push(self, text: str) -> str:
        """Take `text`; what may be given out. After a match (`match` is set) nothing is."""
        if self.match is not None:
            return ""
        if not self._stops:
            self._passed += len(text)
            return text
        text = self._held + text
        found = find_stop(text, self._stops)
        if found is not None:
            self.match = StopMatch(found.stop, self._passed + found.start)
            self._held = ""
            return text[: found.start]
        keep = max(_possible_prefix(text, stop) for stop in self._stops)
        free = text[: len(text) - keep]
        self._held = text[len(free) :]
        self._passed += len(free)
        return free

    def finish(self) -> str:
        """No more text follows: what was held back."""
        held, self._held = self._held, ""
        self._passed += len(held)
        return held


def _possible_prefix(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
