"""From token frames to what a client reads of one choice: text, tokens, log-probabilities, the ending."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from prism.common.messages.generation import Finish, TokenLogprob
from prism.gateway.detokenizer import Detokenizer
from prism.gateway.stop_strings import StopStrings
from prism.gateway.text_tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a choice ended: `reason` is stop or length, `matched` the stop token or stop string."""

    reason: str
    matched: int | str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The log-probability of one token. `offset` is where its text begins, in characters from the start;
    `in_text` is false for a token that ended the choice and is not shown."""

    token: int
    score: TokenLogprob
    offset: int
    in_text: bool = True


class Piece(msgspec.Struct):
    """What came of one frame. `tokens` count in usage, shown or not."""

    text: str = ""
    tokens: list[int] = []
    scores: list[TokenScore] = []
    ending: Ending | None = None


class TextAssembler:
    """Puts one choice together, whose text goes on from that of the tokens `behind`, if there are any. No I/O
    and no clock."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str], behind: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(
            tokenizer.decode,
            tokenizer.special_ids,
            tokenizer.plain_text,
            longest_incomplete=tokenizer.longest_incomplete,
            behind=tokenizer.end_of(behind),
        )
        self._stops = StopStrings(stops)
        self._single_steps = bool(stops)
        self._decoded = 0
        self._shown = 0
        self._pending: deque[TokenScore] = deque()

    def push(
        self,
        tokens: Sequence[int],
        scores: Sequence[TokenLogprob] | None = None,
        finish: Finish | None = None,
    ) -> Piece:
        """Take one frame's tokens. A piece with an ending is the last one."""
        if finish is None and scores is None and not self._single_steps and not self._pending:
            text = self._detokenizer.push(tokens)
            self._decoded += len(text)
            self._shown += len(text)
            return Piece(text, list(tokens))
        piece = Piece()
        stop_token = None
        if finish is not None and finish.matched_token is not None and tokens:
            stop_token = tokens[-1] if tokens[-1] == finish.matched_token else None
        shown = tokens if stop_token is None else tokens[:-1]
        # Token by token where it matters which token a place in the text belongs to.
        steps = [[token] for token in shown] if self._single_steps or scores is not None else [list(shown)]
        for position, step in enumerate(steps):
            if scores is not None and position < len(scores):
                self._pending.append(TokenScore(step[0], scores[position], self._decoded))
            piece.tokens += step
            self._show(piece, self._detokenizer.push(step))
            if self._stops.match is not None:
                return self._cut(piece, finish)
        if finish is not None:
            self._show(piece, self._detokenizer.finish())
            if self._stops.match is not None:
                return self._cut(piece, finish)
            rest = self._stops.finish()
            piece.text += rest
            self._shown += len(rest)
        self._release(piece, everything=finish is not None)
        if stop_token is not None:
            piece.tokens.append(stop_token)
            if scores:
                piece.scores.append(TokenScore(stop_token, scores[-1], self._shown, in_text=False))
        if finish is not None:
            piece.ending = Ending(finish.reason, finish.matched_token, finish.cached_tokens)
        return piece

    def _show(self, piece: Piece, text: str) -> None:
        self._decoded += len(text)
        free = self._stops.push(text)
        self._shown += len(free)
        piece.text += free

    def _release(self, piece: Piece, *, everything: bool) -> None:
        """Give out the scores of tokens whose text is out, so that the two never tell different things."""
        while self._pending and (everything or self._pending[0].offset < self._shown):
            piece.scores.append(self._pending.popleft())

    def _cut(self, piece: Piece, finish: Finish | None) -> Piece:
        match = self._stops.match
        assert match is not None
        for score in self._pending:
            in_text = score.offset < match.start
            piece.scores.append(TokenScore(score.token, score.score, score.offset, in_text))
        self._pending.clear()
        piece.ending = Ending("stop", match.stop, finish.cached_tokens if finish else 0)
        return piece
