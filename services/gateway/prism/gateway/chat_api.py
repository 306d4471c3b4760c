"""POST /v1/chat/completions: wire types, validation, and the form of the answer."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.datastructures import Headers

from prism.common.errors import ErrorCode, PrismError
from prism.gateway.event_template import EventTemplate
from prism.gateway.openai_fields import OpenAIFields, StreamedUsage, check_fields, shown, token_logprob
from prism.gateway.plan import Choice, Plan, Planner, Servable, Usage, Wanted, count_usage
from prism.gateway.request_fields import invalid, read_json, refuse_unsupported
from prism.gateway.sampling import read_stops
from prism.gateway.text_assembler import Piece, TokenScore

ROLES = ("system", "developer", "user", "assistant")


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of the conversation. An assistant's message may be handed back as it was answered."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


MESSAGE_HARMLESS: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}


class ChatRequest(OpenAIFields, kw_only=True, forbid_unknown_fields=True):
    """The body. Parameters typed Any are known and not supported: see `HARMLESS`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


HARMLESS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


async def plan_chat(body: bytes, headers: Headers, planner: Planner) -> Plan:
    """Read, check and tokenise a request. Raises PrismError for whatever is wrong with it."""
    request = read_json(body, ChatRequest)
    check_fields(request, HARMLESS)
    max_tokens = _max_tokens(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    stops = read_stops(request.stop)
    messages = read_messages(request.messages)
    model = await planner.servable(request.model)
    prompt = model.tokenizer.chat_template.render(messages)
    prompts = await model.encode([prompt], add_special_tokens=False)
    request_id = f"chatcmpl-{secrets.token_hex(16)}"
    wanted = Wanted(
        request=request_id,
        fields=request,
        prompt_param="messages",
        streamed=bool(request.stream or stops),
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        n=request.n or 1,
        seed=request.seed,
        logit_bias=request.logit_bias,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    choices = planner.choices(model, prompts, wanted, headers)
    answer = ChatAnswer(request_id, model, bool(request.logprobs), request.streamed_usage)
    return Plan(request_id, model, choices, stops, bool(request.stream), answer)


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise invalid(
            "max_tokens", f"max_tokens ({old}) and max_completion_tokens ({new}) differ; give one of them"
        )
    return old if new is None else new


def read_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates know them: text parts joined by line breaks, developers as system.

    Raises PrismError that names the message at fault.
    """
    if not messages:
        raise invalid("messages", "messages must not be empty")
    return [_read_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _read_message(where: str, message: Message) -> dict[str, str]:
    if message.role not in ROLES:
        raise invalid(
            f"{where}.role", f"{where}.role must be one of {', '.join(ROLES)}; got {message.role!r}"
        )
    try:
        refuse_unsupported(msgspec.structs.asdict(message), MESSAGE_HARMLESS)
    except PrismError as error:
        raise PrismError(error.code, f"{where}.{error.message}", param=f"{where}.{error.param}") from error
    if message.content is None:
        raise invalid(f"{where}.content", f"{where}.content must be a string or a list of text parts")
    read = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _read_content(f"{where}.content", message.content),
    }
    return read if message.name is None else {**read, "name": message.name}


def _read_content(where: str, content: str | list[ContentPart]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if part.type != "text":
            raise PrismError(
                ErrorCode.UNSUPPORTED,
                f"{where}[{index}].type {part.type!r} is not supported; only text parts are",
                param=f"{where}[{index}].type",
            )
        if part.text is None:
            raise invalid(f"{where}[{index}].text", f"{where}[{index}].text is missing")
        texts.append(part.text)
    return "\n".join(texts)


class ChatAnswer:
    """The chat.completion object, whole or in chunks."""

    repeats = False

    def __init__(
        self, request_id: str, model: Servable, logprobs: bool, streamed_usage: StreamedUsage
    ) -> None:
        self._model = model
        self._logprobs = logprobs
        self._streamed_usage = streamed_usage
        self._id = request_id
        self._created = int(time.time())
        self._texts: dict[int, EventTemplate] = {}

    def opening(self, choices: Sequence[Choice]) -> list[object]:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk(index, delta, [], None, self._streamed_usage.so_far(choice, 0))
            for index, choice in enumerate(choices)
        ]

    def events(self, index: int, choice: Choice, piece: Piece) -> list[object]:
        """New text, then the ending."""
        chunks: list[object] = []
        scores = shown(piece.scores) if self._logprobs else []
        used = self._streamed_usage.so_far(choice, len(choice.tokens))
        if scores or (piece.text and used):
            chunks.append(self._chunk(index, {"content": piece.text}, scores, None, used))
        elif piece.text:
            chunks.append(self._text(index).fill(piece.text))
        if piece.ending is not None:
            chunks.append(self._chunk(index, {}, [], piece.ending.reason, used))
        return chunks

    def _text(self, index: int) -> EventTemplate:
        template = self._texts.get(index)
        if template is None:
            template = EventTemplate(lambda text: self._chunk(index, {"content": text}, [], None))
            self._texts[index] = template
        return template

    def closing(self, choices: Sequence[Choice]) -> list[object]:
        """The usage, if it was asked for."""
        if self._streamed_usage is StreamedUsage.NOWHERE:
            return []
        return [{**self._head("chat.completion.chunk"), "choices": [], "usage": count_usage(choices)}]

    def whole(self, choices: Sequence[Choice]) -> object:
        """All choices and the usage."""
        told = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._shown_logprobs(shown(choice.scores)) if self._logprobs else None,
                "finish_reason": choice.ending.reason if choice.ending else None,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head("chat.completion"), "choices": told, "usage": count_usage(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.spec.model_name,
        }

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, str],
        scores: list[TokenScore],
        reason: str | None,
        used: Usage | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._shown_logprobs(scores) if scores else None,
            "finish_reason": reason,
        }
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return chunk if self._streamed_usage is StreamedUsage.NOWHERE else {**chunk, "usage": used}

    def _shown_logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        content = [
            {
                **token_logprob(self._model, score.token, score.score.logprob),
                "top_logprobs": [token_logprob(self._model, *best) for best in score.score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}
