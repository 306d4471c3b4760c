"""Text out of tokens, as they come: what is given out joins to exactly what one decode of all would give, by
byte-fallback decoders if all bytes make characters."""

from collections.abc import Callable, Container, Sequence

REPLACEMENT = "\ufffd"
LONGEST_INCOMPLETE = 3
"""A UTF-8 character has at most 4 bytes, so at most 3 of them stand there unfinished, which a byte-level
decoder may show as one replacement character each."""


class Detokenizer:
    """Decodes a stream of token ids.

    `decode` must be that of the tokenizer, without special tokens; `skipped` holds the ids that it leaves
    out. Characters whose bytes are not complete yet are held back until they are, or until `finish`.

    Only a window of tokens is decoded each time: those since the last place where the text stood on a
    character boundary, behind those of one such stretch before as context, because some decoders treat the
    first token of a text in another way (they strip its leading space).

    `plain` says what a token adds wherever it stands, None where that depends on its neighbours: behind a
    character boundary such tokens need no decoding at all.

    `longest_incomplete` is how many replacement characters at the end may become another one with the next
    tokens; None for all that stand there: a byte-fallback decoder shows a whole run of bytes so, as long as
    its last character is unfinished. `behind` are the last tokens of a text that this one goes on.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        skipped: Container[int] = (),
        plain: Callable[[int], str | None] = lambda token: None,
        *,
        longest_incomplete: int | None = LONGEST_INCOMPLETE,
        behind: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._plain = plain
        self._longest_incomplete = longest_incomplete
        self._window = [token for token in behind if token not in skipped]
        self._context = len(self._window)
        text = decode(self._window) if self._window else ""
        self._given = self._settled_length(text)
        self._held = self._given < len(text)

    def push(self, tokens: Sequence[int]) -> str:
        """Take `tokens`; the text that is settled now and was not before."""
        if not self._held:
            texts = [self._plain(token) for token in tokens]
            if None not in texts:
                return "".join(texts)  # type: ignore[arg-type]  # none is None
        self._window += [token for token in tokens if token not in self._skipped]
        text = self._decode(self._window)
        settled = self._settled_length(text)
        self._held = settled < len(text)
        if settled <= self._given:
            return ""
        new = text[self._given : settled]
        self._given = settled
        if settled == len(text):
            del self._window[: self._context]
            self._context = len(self._window)
            self._given = len(self._decode(self._window))
        return new

    def finish(self) -> str:
        """No more tokens follow: the text that was held back."""
        text = self._decode(self._window)[self._given :]
        self._given += len(text)
        return text

    def _settled_length(self, text: str) -> int:
        settled = len(text.rstrip(REPLACEMENT))
        if self._longest_incomplete is None:
            return settled
        return max(settled, len(text) - self._longest_incomplete)
