"""What simulated engines say: text that shows by itself whether a token was lost, doubled or late.

Each token is one printable ASCII character, so that text and tokens count alike.

- `numbered`: the sequence's own positions, written out in groups of six characters, "00000.00001.00002.":
  which character stands at a position depends on nothing but that position, counted from the start of the
  prompt. An engine that takes over a generation therefore goes on where the other one stopped.
- `stamped`: groups of twelve characters, each the time at which its first character left the engine, in
  microseconds on the machine's monotonic clock: whoever reads a group knows how long it took to arrive.
"""

from collections.abc import Callable

NUMBER_WIDTH = 5
NUMBERED_GROUP = NUMBER_WIDTH + 1
STAMP_WIDTH = 11
STAMPED_GROUP = STAMP_WIDTH + 1
STAMP_SPACE = 10**STAMP_WIDTH
FIRST_PRINTABLE = ord("!")


def numbered_character(position: int) -> str:
    """The character at `position`, counted from 0 at the start of the prompt."""
    group, place = divmod(position, NUMBERED_GROUP)
    if place == NUMBER_WIDTH:
        return "."
    return f"{group % 10**NUMBER_WIDTH:0{NUMBER_WIDTH}d}"[place]


def numbered_text(position: int, count: int) -> str:
    """`count` characters from `position` on: what a generation of so many tokens after a prompt of `position`
    tokens must read."""
    return "".join(numbered_character(position + index) for index in range(count))


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


class StampedTokens:
    """The tokens of one `stamped` generation."""

    def __init__(self, printable_id: int) -> None:
        self._offset = printable_id - FIRST_PRINTABLE
        self._group = ""
        self._place = 0

    def next(self, now_us: int) -> int:
        """The next token id; `now_us` is the time now in microseconds."""
        if self._place == len(self._group):
            self._group = f"{now_us % STAMP_SPACE:0{STAMP_WIDTH}d}."
            self._place = 0
        character = self._group[self._place]
        self._place += 1
        return ord(character) + self._offset


TokenSource = NumberedTokens | StampedTokens
MakeTokens = Callable[[int], TokenSource]
"""Makes the tokens of a generation from the length of its prompt."""
