"""The token ids of what simulated engines say; the text itself is `prism.common.simulated_text`."""

from collections.abc import Callable

from prism.common.simulated_text import numbered_character, stamp

FIRST_PRINTABLE = ord("!")


class NumberedTokens:
    """The tokens of one `numbered` generation, whose prompt has `position` tokens."""

    def __init__(self, position: int, printable_id: int) -> None:
        self._position = position
        self._offset = printable_id - FIRST_PRINTABLE

    def next(self, now_us: int) -> int:
        """The next token id."""
        character = numbered_character(self._position)
        self._position += 1
        return ord(character) + self._offset

    def restamp(self, now_us: int) -> None:
        """Numbers know no time."""


class StampedTokens:
    """The tokens of one `stamped` generation."""

    def __init__(self, printable_id: int) -> None:
        self._offset = printable_id - FIRST_PRINTABLE
        self._group = ""
        self._place = 0

    def next(self, now_us: int) -> int:
        """The next token id; `now_us` is the time now in microseconds."""
        if self._place == len(self._group):
            self._group = stamp(now_us)
            self._place = 0
        character = self._group[self._place]
        self._place += 1
        return ord(character) + self._offset

    def restamp(self, now_us: int) -> None:
        """The step that began a group leaves the engine only now. The one digit that was said stays."""
        if self._place == 1:
            later = stamp(now_us)
            if later[0] == self._group[0]:
                self._group = later


TokenSource = NumberedTokens | StampedTokens
MakeTokens = Callable[[int], TokenSource]
"""Makes the tokens of a generation from the length of its prompt."""
