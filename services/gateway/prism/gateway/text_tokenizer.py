"""A model's tokenizer: text to token ids and back, and how single tokens look."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from tokenizers import Tokenizer

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import TokenizerBundle
from prism.gateway.chat_template import ChatTemplate
from prism.gateway.detokenizer import LONGEST_INCOMPLETE

CONTEXT_TOKENS = 5
"""So many tokens of a prompt stand before what goes on from it: one is enough for a space, four for a
character."""

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"


class TextTokenizer:
    """Made from a bundle (slow: a good part of a second for a large vocabulary), then used from any thread.

    Raises PrismError(model_failed) when the bundle holds no readable tokenizer.
    """

    def __init__(self, bundle: TokenizerBundle) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(bundle.tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise PrismError(
                ErrorCode.MODEL_FAILED, f"the model's tokenizer.json cannot be read: {error}"
            ) from error
        # Files carry the truncation and padding of their training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(token for token, entry in added.items() if entry.special)
        self._added_ids: frozenset[int] = frozenset(added)
        decoders = _decoder_types(json.loads(bundle.tokenizer_json).get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders
        self._concatenates = decoders <= {"ByteLevel", "Sequence"} and self._byte_level
        bos = bundle.special_tokens.get("bos_token") if bundle.add_bos else None
        self._bos: int | None = None if bos is None else self._tokenizer.token_to_id(bos)
        self._plain: dict[int, str | None] = {}
        self._template: ChatTemplate | None = None
        self._template_problem = "it has none"
        if bundle.chat_template is not None:
            try:
                self._template = ChatTemplate(bundle.chat_template, bundle.special_tokens)
            except jinja2.TemplateError as error:
                self._template_problem = f"its own does not compile: {error}"

    @property
    def longest_incomplete(self) -> int | None:
        """See Detokenizer."""
        return None if self._byte_fallback else LONGEST_INCOMPLETE

    def end_of(self, prompt: Sequence[int]) -> Sequence[int]:
        """Of `prompt`, what the text of the tokens behind it depends on: nothing, where a decoder only joins
        bytes."""
        return () if self._concatenates else prompt[-CONTEXT_TOKENS:]

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template. Raises PrismError(invalid_request) when the model has none that works."""
        if self._template is None:
            raise PrismError(
                ErrorCode.INVALID_REQUEST,
                f"this model needs a chat template for /v1/chat/completions, and {self._template_problem}; "
                "use /v1/completions",
                param="model",
            )
        return self._template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of `text`; those of a prompt have what the model wants in front of one."""
        ids = list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        if add_special_tokens and self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def plain_text(self, token: int) -> str | None:
        """What `token` adds to a text wherever it stands behind whole characters; None where that depends on
        its neighbours. Byte-level decoders join bytes, so a token of nothing but ASCII is such a one."""
        try:
            return self._plain[token]
        except KeyError:
            text = self.decode([token]) if self._concatenates else None
            self._plain[token] = plain = text if text is not None and text.isascii() else None
            return plain

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; special tokens as they are written."""
        text: str | None = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if token in self._added_ids:
            return text.encode()
        if self._byte_level and all(char in _BYTE_OF for char in text):
            return bytes(_BYTE_OF[char] for char in text)
        if self._byte_fallback and (single := _FALLBACK_BYTE.fullmatch(text)):
            return bytes([int(single[1], 16)])
        return text.replace(_WORD_START, " ").encode()


def _decoder_types(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = [_decoder_types(part) for part in decoder.get("decoders", [])]
    return {str(decoder.get("type"))}.union(*inner)


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable ones themselves, others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_alphabet()
