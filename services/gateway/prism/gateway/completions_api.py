"""POST /v1/completions: wire types, validation, and the form of the answer."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers

from prism.gateway.event_template import EventTemplate
from prism.gateway.openai_fields import OpenAIFields, StreamedUsage, bytes_or_text, check_fields, shown
from prism.gateway.plan import Choice, Plan, Planner, Servable, Usage, Wanted, count_usage
from prism.gateway.request_fields import Allowed, check_ranges, invalid, read_json
from prism.gateway.sampling import MOST_LOGPROBS, check_token_ids, read_stops
from prism.gateway.text_assembler import Piece, TokenScore

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(OpenAIFields, kw_only=True, forbid_unknown_fields=True):
    """The body. Parameters typed Any are known and not supported: see `HARMLESS`."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None


HARMLESS: dict[str, tuple[Any, ...]] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}


async def plan_completion(body: bytes, headers: Headers, planner: Planner) -> Plan:
    """Read, check and tokenise a request. Raises PrismError for whatever is wrong with it."""
    request = read_json(body, CompletionRequest)
    check_fields(request, HARMLESS)
    check_ranges({"logprobs": request.logprobs}, {"logprobs": Allowed(0, MOST_LOGPROBS)})
    stops = read_stops(request.stop)
    model = await planner.servable(request.model)
    prompts = await encode_prompts(model, request.prompt, "prompt")
    request_id = f"cmpl-{secrets.token_hex(16)}"
    wanted = Wanted(
        request=request_id,
        fields=request,
        prompt_param="prompt",
        streamed=bool(request.stream or stops),
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        min_tokens=request.min_tokens,
        n=request.n or 1,
        seed=request.seed,
        logit_bias=request.logit_bias,
        top_logprobs=request.logprobs,
    )
    choices = planner.choices(model, prompts, wanted, headers)
    answer = CompletionAnswer(request_id, model, request.logprobs, request.streamed_usage)
    return Plan(request_id, model, choices, stops, bool(request.stream), answer, continues=True)


async def encode_prompts(
    model: Servable, prompt: str | Sequence[str | int | list[int]], param: str
) -> list[list[int]]:
    """Token ids of each prompt: a string, a list of strings, token ids, or a list of token-id lists.

    Raises PrismError(invalid_request).
    """
    if isinstance(prompt, str):
        return await model.encode([prompt], add_special_tokens=True)
    if not prompt:
        raise invalid(param, f"{param} must not be empty")
    texts = [item for item in prompt if isinstance(item, str)]
    ids = [item for item in prompt if isinstance(item, int)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(texts) == len(prompt):
        return await model.encode(texts, add_special_tokens=True)
    if len(ids) == len(prompt):
        lists = [ids]
    elif len(lists) != len(prompt):
        raise invalid(
            param, f"{param} must be a string, a list of strings, token ids, or lists of them; not a mixture"
        )
    for tokens in lists:
        check_token_ids(param, tokens, model.vocab_size)
    return lists


class CompletionAnswer:
    """The text_completion object, whole or in chunks."""

    repeats = False

    def __init__(
        self, request_id: str, model: Servable, logprobs: int | None, streamed_usage: StreamedUsage
    ) -> None:
        self._model = model
        self._logprobs = logprobs
        self._streamed_usage = streamed_usage
        self._id = request_id
        self._created = int(time.time())
        self._texts: dict[int, EventTemplate] = {}

    def opening(self, choices: Sequence[Choice]) -> list[object]:
        """Nothing."""
        return []

    def events(self, index: int, choice: Choice, piece: Piece) -> list[object]:
        """New text and the ending, in one chunk."""
        scores = shown(piece.scores) if self._logprobs is not None else []
        used = self._streamed_usage.so_far(choice, len(choice.tokens))
        if not scores and piece.ending is None:
            if not piece.text:
                return []
            if used is None:
                return [self._text(index).fill(piece.text)]
        return [self._chunk(index, piece.text, scores, piece.ending.reason if piece.ending else None, used)]

    def _text(self, index: int) -> EventTemplate:
        template = self._texts.get(index)
        if template is None:
            template = self._texts[index] = EventTemplate(lambda text: self._chunk(index, text, [], None))
        return template

    def _chunk(
        self,
        index: int,
        text: str,
        scores: list[TokenScore],
        reason: str | None,
        used: Usage | None = None,
    ) -> dict[str, Any]:
        told = {
            "index": index,
            "text": text,
            "logprobs": self._shown_logprobs(scores) if scores else None,
            "finish_reason": reason,
        }
        chunk = {**self._head(), "choices": [told]}
        return chunk if self._streamed_usage is StreamedUsage.NOWHERE else {**chunk, "usage": used}

    def closing(self, choices: Sequence[Choice]) -> list[object]:
        """The usage, if it was asked for."""
        if self._streamed_usage is StreamedUsage.NOWHERE:
            return []
        return [{**self._head(), "choices": [], "usage": count_usage(choices)}]

    def whole(self, choices: Sequence[Choice]) -> object:
        """All choices and the usage."""
        told = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": None if self._logprobs is None else self._shown_logprobs(shown(choice.scores)),
                "finish_reason": choice.ending.reason if choice.ending else None,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head(), "choices": told, "usage": count_usage(choices)}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.spec.model_name,
        }

    def _shown_logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        def best(score: TokenScore) -> dict[str, float]:
            # Sorted upwards, so that of two tokens that look the same the likelier one stays.
            ranked = sorted(score.score.top, key=lambda entry: entry[1])
            by_text = {bytes_or_text(self._model, token): logprob for token, logprob in ranked}
            return dict(sorted(by_text.items(), key=lambda entry: -entry[1]))

        return {
            "tokens": [bytes_or_text(self._model, score.token) for score in scores],
            "token_logprobs": [score.score.logprob for score in scores],
            "top_logprobs": [best(score) for score in scores] if self._logprobs else None,
            "text_offset": [score.offset for score in scores],
        }
