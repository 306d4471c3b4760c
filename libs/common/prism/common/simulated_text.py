"""What the simulated device says: text that shows by itself whether a token was lost, doubled or late.

Each token is one printable ASCII character, so that text and tokens count alike.

- `numbered`: the sequence's own positions, written out in groups of six characters, "00000.00001.00002.":
  which character stands at a position depends on nothing but that position, counted from the start of the
  prompt. An engine that takes over a generation therefore goes on where the other one stopped.
- `stamped`: groups of twelve characters, each the time at which its first character left the engine, in
  microseconds on the machine's monotonic clock: whoever reads a group knows how long it took to arrive.
"""

NUMBER_WIDTH = 5
NUMBERED_GROUP = NUMBER_WIDTH + 1
STAMP_WIDTH = 11
STAMPED_GROUP = STAMP_WIDTH + 1
STAMP_SPACE: int = 10**STAMP_WIDTH


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


def stamp(now_us: int) -> str:
    """The group that says `now_us`, microseconds on the monotonic clock."""
    return f"{now_us % STAMP_SPACE:0{STAMP_WIDTH}d}."


def stamp_age_us(group: str, now_us: int) -> int:
    """How long before `now_us` the group was stamped. Raises ValueError for what is no such group."""
    if len(group) != STAMPED_GROUP or group[-1] != "." or not group[:-1].isdigit():
        raise ValueError(f"{group!r} is no stamp: tokens were lost, doubled or changed")
    return (now_us - int(group[:-1])) % STAMP_SPACE
