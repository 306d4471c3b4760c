"""Events of which only the text differs: encoded once for a stream, filled in for each token."""

import secrets
from collections.abc import Callable

import msgspec

_encode = msgspec.json.Encoder().encode


class EventTemplate:
    """`build` makes the event of a text; the text must stand in it exactly once."""

    def __init__(self, build: Callable[[str], object]) -> None:
        mark = secrets.token_hex(16)
        self._before, self._after = _encode(build(mark)).split(_encode(mark))

    def fill(self, text: str) -> bytes:
        """The event with this text, as JSON."""
        return self._before + _encode(text) + self._after
