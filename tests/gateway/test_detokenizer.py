"""Incremental detokenisation gives exactly what decoding all at once gives."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway.cutting import cut, cuts
from tokenizers import Tokenizer, decoders, models

from prism.common.messages.models import TokenizerBundle
from prism.gateway.detokenizer import Detokenizer
from prism.gateway.text_tokenizer import TextTokenizer

pytestmark = pytest.mark.core

VOCABULARY = 402
"""Two ids more than there are tokens: models pad their vocabulary."""


def shortcut(tokenizer: TextTokenizer, *, plain: bool = True) -> Detokenizer:
    """A detokenizer of `tokenizer`, with or without its short cut for plain tokens."""
    if plain:
        return Detokenizer(
            tokenizer.decode,
            tokenizer.special_ids,
            tokenizer.plain_text,
            longest_incomplete=tokenizer.longest_incomplete,
        )
    return Detokenizer(
        tokenizer.decode, tokenizer.special_ids, longest_incomplete=tokenizer.longest_incomplete
    )


def byte_fallback_tokenizer() -> TextTokenizer:
    """As Llama 2's: words with their space in front, and every byte as a token of its own."""
    words = ["▁the", "▁dog", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(TokenizerBundle(trained.to_str()))


BYTE_FALLBACK = byte_fallback_tokenizer()
THE, DOG, S = 0, 1, 2


def bytes_of(text: str) -> list[int]:
    """The tokens of a text in which every byte is one."""
    return [4 + byte for byte in text.encode()]


@given(tokens=st.lists(st.integers(0, VOCABULARY), max_size=60), sizes=cuts(), plain=st.booleans())
def test_pieces_join_to_the_whole_decode(
    tokenizer: TextTokenizer, tokens: list[int], sizes: list[int], plain: bool
) -> None:
    detokenizer = shortcut(tokenizer, plain=plain)
    text = "".join(detokenizer.push(piece) for piece in cut(tokens, sizes)) + detokenizer.finish()
    assert text == tokenizer.decode(tokens)


@given(text=st.text(max_size=40), sizes=cuts(), plain=st.booleans())
def test_well_formed_text_never_shows_a_half_character(
    tokenizer: TextTokenizer, text: str, sizes: list[int], plain: bool
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = shortcut(tokenizer, plain=plain)
    so_far = ""
    for piece in cut(tokens, sizes):
        so_far += detokenizer.push(piece)
        assert text.startswith(so_far)
    assert so_far + detokenizer.finish() == text


def test_character_appears_with_its_last_byte(tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode("𐍈", add_special_tokens=False)
    assert len(tokens) == 4
    detokenizer = shortcut(tokenizer)
    assert [detokenizer.push([token]) for token in tokens] == ["", "", "", "𐍈"]
    assert detokenizer.finish() == ""


def test_half_a_character_at_the_end_is_shown_as_a_whole_decode_shows_it(tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode("a𐍈", add_special_tokens=False)[:-1]
    detokenizer = shortcut(tokenizer)
    assert detokenizer.push(tokens) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_sentencepiece_style_spaces_survive_between_pieces() -> None:
    assert BYTE_FALLBACK.plain_text(S) is None
    detokenizer = shortcut(BYTE_FALLBACK)
    pieces = [detokenizer.push([token]) for token in (THE, DOG, S, *bytes_of("€"), DOG)]
    assert pieces == ["the", " dog", "s", "", "", "€", " dog"]


@pytest.mark.parametrize("text", ["🎉🎉", "🇩🇪", "你好", "👍🏽é€"])
def test_characters_of_bytes_that_follow_each_other_are_each_shown_whole(text: str) -> None:
    # The decoder shows a whole run of bytes as replacement characters while its last character is unfinished.
    detokenizer = shortcut(BYTE_FALLBACK)
    pieces = [detokenizer.push([token]) for token in (*bytes_of(text), DOG)]
    assert [piece for piece in pieces if piece] == [*text, " dog"]


@given(
    words=st.lists(st.one_of(st.sampled_from([[THE], [DOG], [S]]), st.text(max_size=4).map(bytes_of))),
    sizes=cuts(),
)
def test_text_of_words_and_bytes_joins_to_the_whole_decode(words: list[list[int]], sizes: list[int]) -> None:
    tokens = [token for word in words for token in word]
    text = BYTE_FALLBACK.decode(tokens)
    detokenizer = shortcut(BYTE_FALLBACK)
    so_far = ""
    for piece in cut(tokens, sizes):
        so_far += detokenizer.push(piece)
        assert text.startswith(so_far)
    assert so_far + detokenizer.finish() == text


def test_text_that_goes_on_behind_other_text_keeps_its_first_space() -> None:
    alone, behind = (
        Detokenizer(BYTE_FALLBACK.decode, longest_incomplete=None, behind=prompt) for prompt in ([], [THE])
    )
    assert alone.push([DOG]) == "dog"
    assert [behind.push([DOG]), behind.push([S]), behind.finish()] == [" dog", "s", ""]


def test_a_character_that_the_text_before_has_begun_is_finished() -> None:
    first, *rest = bytes_of("€")
    behind = Detokenizer(BYTE_FALLBACK.decode, longest_incomplete=None, behind=[THE, first])
    assert [behind.push([token]) for token in rest] == ["", "€"]


def test_work_per_token_does_not_grow_with_the_text(tokenizer: TextTokenizer) -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return tokenizer.decode(tokens)

    detokenizer = Detokenizer(decode, tokenizer.special_ids)  # type: ignore[arg-type]
    words = tokenizer.encode("quick brown fox </s>" * 50, add_special_tokens=False)
    for token in words:
        detokenizer.push([token])
    assert longest < 10


def test_plain_tokens_behind_whole_characters_are_not_decoded(tokenizer: TextTokenizer) -> None:
    decoded: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        decoded.extend(tokens)
        return tokenizer.decode(tokens)

    detokenizer = Detokenizer(decode, tokenizer.special_ids, tokenizer.plain_text)
    word = tokenizer.encode("brown", add_special_tokens=False)
    euro = tokenizer.encode("€", add_special_tokens=False)
    assert "".join(detokenizer.push([token]) for token in word) == "brown"
    assert decoded == []
    assert detokenizer.push(euro[:-1]) == ""
    # Bytes of a character are awaited: what follows decides what they become.
    assert detokenizer.push(word) == "\ufffdbrown"
