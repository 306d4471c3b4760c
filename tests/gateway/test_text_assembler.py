"""A choice's text, tokens, scores and ending, however its frames are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway.cutting import cut, cuts
from tests.gateway.test_detokenizer import BYTE_FALLBACK, DOG, THE

from prism.common.messages.generation import Finish, TokenLogprob
from prism.gateway.stop_strings import find_stop
from prism.gateway.text_assembler import Piece, TextAssembler
from prism.gateway.text_tokenizer import TextTokenizer

pytestmark = pytest.mark.core

TEXTS = st.text(alphabet=st.sampled_from("abc é🙂 quick"), max_size=40)


def assemble(
    tokenizer: TextTokenizer, tokens: list[int], sizes: list[int], stops: list[str], finish: Finish
) -> list[Piece]:
    """The pieces of frames cut at `sizes`; each token's score is its position."""
    assembler = TextAssembler(tokenizer, stops)
    frames = cut(list(enumerate(tokens)), sizes)
    pieces = []
    for number, frame in enumerate(frames):
        scores = [TokenLogprob(-float(position)) for position, _ in frame]
        last = finish if number == len(frames) - 1 else None
        pieces.append(assembler.push([token for _, token in frame], scores, last))
        if pieces[-1].ending is not None:
            break
    return pieces


def all_tokens(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def test_text_that_goes_on_from_a_prompt_keeps_the_space_between_the_two() -> None:
    assert TextAssembler(BYTE_FALLBACK, [], behind=[DOG, THE]).push([DOG]).text == " dog"
    assert TextAssembler(BYTE_FALLBACK, []).push([DOG]).text == "dog"


@given(text=TEXTS, sizes=cuts())
def test_all_that_came_is_told_once(tokenizer: TextTokenizer, text: str, sizes: list[int]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = assemble(tokenizer, tokens, sizes, [], Finish("length", 1, len(tokens)))
    assert "".join(piece.text for piece in pieces) == text
    assert all_tokens(pieces) == tokens
    scores = [score for piece in pieces for score in piece.scores]
    assert [score.token for score in scores] == tokens
    assert [-score.score.logprob for score in scores] == list(range(len(tokens)))
    assert all(score.in_text for score in scores)
    assert pieces[-1].ending is not None
    assert pieces[-1].ending.reason == "length"


@given(text=TEXTS, stop=st.sampled_from(["é", "b ", "qu", "🙂c"]), sizes=cuts())
def test_stop_string_cuts_text_and_tokens_at_the_same_place_for_every_cut(
    tokenizer: TextTokenizer, text: str, stop: str, sizes: list[int]
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    finish = Finish("length", 1, len(tokens))
    pieces = assemble(tokenizer, tokens, sizes, [stop], finish)
    singles = assemble(tokenizer, tokens, [1] * len(tokens), [stop], finish)
    found = find_stop(text, [stop])
    assert "".join(piece.text for piece in pieces) == (text if found is None else text[: found.start])
    assert all_tokens(pieces) == all_tokens(singles)
    ending = pieces[-1].ending
    assert ending is not None
    assert (ending.reason, ending.matched) == (("length", None) if found is None else ("stop", stop))


def test_stop_token_counts_and_does_not_show(tokenizer: TextTokenizer) -> None:
    dog = tokenizer.encode("dog", add_special_tokens=False)
    stop = tokenizer.encode("z", add_special_tokens=False)[0]
    piece = TextAssembler(tokenizer, []).push(
        [*dog, stop],
        [TokenLogprob(-1.0)] * (len(dog) + 1),
        Finish("stop", 1, len(dog) + 1, matched_token=stop),
    )
    assert piece.text == "dog"
    assert piece.tokens == [*dog, stop]
    assert [score.in_text for score in piece.scores] == [True] * len(dog) + [False]


def test_score_waits_for_its_text(tokenizer: TextTokenizer) -> None:
    assembler = TextAssembler(tokenizer, ["END"])
    tokens = tokenizer.encode("E", add_special_tokens=False)
    held = assembler.push(tokens, [TokenLogprob(-1.0)])
    assert (held.text, held.scores) == ("", [])
    freed = assembler.push(tokenizer.encode("x", add_special_tokens=False), [TokenLogprob(-2.0)])
    assert freed.text == "Ex"
    assert [(score.score.logprob, score.offset) for score in freed.scores] == [(-1.0, 0), (-2.0, 1)]
