"""How single tokens look, and what a bundle without usable parts leads to."""

import pytest
from tokenizers import Tokenizer, processors

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import TokenizerBundle
from prism.gateway.text_tokenizer import TextTokenizer

pytestmark = pytest.mark.core


def test_token_bytes_join_to_the_text(tokenizer: TextTokenizer) -> None:
    text = "naïve 模型 🦩\n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode() == text


def test_special_tokens_look_as_they_are_written(tokenizer: TextTokenizer) -> None:
    assert tokenizer.token_bytes(1) == b"</s>"
    assert tokenizer.decode([1]) == ""
    assert tokenizer.special_ids == {0, 1}


def test_id_beyond_the_vocabulary_stands_for_nothing(tokenizer: TextTokenizer) -> None:
    assert tokenizer.token_bytes(10_000) == b""


def test_truncation_of_the_file_is_switched_off(bundle: TokenizerBundle) -> None:
    truncating = Tokenizer.from_str(bundle.tokenizer_json)
    truncating.enable_truncation(max_length=2)
    tokenizer = TextTokenizer(TokenizerBundle(truncating.to_str()))
    assert len(tokenizer.encode("the quick brown fox", add_special_tokens=False)) > 2


@pytest.mark.parametrize("by_the_file_too", [False, True])
def test_prompts_of_a_model_that_wants_a_first_token_begin_with_it_once(
    bundle: TokenizerBundle, by_the_file_too: bool
) -> None:
    trained = Tokenizer.from_str(bundle.tokenizer_json)
    trained.post_processor = (
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        if by_the_file_too
        else processors.ByteLevel(trim_offsets=False)
    )
    tokenizer = TextTokenizer(
        TokenizerBundle(trained.to_str(), special_tokens={"bos_token": "<s>"}, add_bos=True)
    )
    text = tokenizer.encode("the dog", add_special_tokens=False)
    assert text[0] != 0, "a chat template writes it itself"
    assert tokenizer.encode("the dog", add_special_tokens=True) == [0, *text]


def test_unreadable_tokenizer_is_told(bundle: TokenizerBundle) -> None:
    with pytest.raises(PrismError) as caught:
        TextTokenizer(TokenizerBundle("{}"))
    assert caught.value.code is ErrorCode.MODEL_FAILED


def test_model_without_chat_template_points_to_completions(bundle: TokenizerBundle) -> None:
    with pytest.raises(PrismError, match="use /v1/completions"):
        _ = TextTokenizer(TokenizerBundle(bundle.tokenizer_json)).chat_template


def test_template_that_does_not_compile_leaves_the_rest_working(bundle: TokenizerBundle) -> None:
    tokenizer = TextTokenizer(TokenizerBundle(bundle.tokenizer_json, "{% for %}"))
    assert tokenizer.encode("dog", add_special_tokens=False)
    with pytest.raises(PrismError, match="does not compile"):
        _ = tokenizer.chat_template
