"""Schemas of the OpenAPI document: what goes in and what comes out."""

from typing import Any

Schema = dict[str, Any]


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _number(description: str, low: float, high: float, default: float | None = None) -> Schema:
    bounds: Schema = {"minimum": low, "maximum": high}
    if default is not None:
        bounds["default"] = default
    return {"type": ["number", "null"], "description": description, **bounds}


def _integer(description: str, **more: Any) -> Schema:
    return {"type": ["integer", "null"], "description": description, **more}


def _boolean(description: str) -> Schema:
    return {"type": ["boolean", "null"], "description": description, "default": False}


def _object(required: list[str] | None = None, /, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    return {**schema, "required": required} if required else schema


def _closed(required: list[str] | None = None, /, **properties: Schema) -> Schema:
    """An object that nothing else may be in."""
    return {**_object(required, **properties), "additionalProperties": False}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _above_zero(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key != "minimum"} | {"exclusiveMinimum": 0}


STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
TOKEN_IDS = _list({"type": "integer", "minimum": 0})
NULLABLE_STRING: Schema = {"type": ["string", "null"]}
ANY_OBJECT: Schema = {"type": ["object", "null"]}

STOP: Schema = {
    "description": "Text before which the answer ends",
    "anyOf": [
        {"type": "string", "minLength": 1},
        _list({"type": "string", "minLength": 1}, maxItems=16),
        {"type": "null"},
    ],
}
PROMPT: Schema = {
    "description": "A string, strings, token ids, or lists of token ids",
    "anyOf": [STRING, _list(STRING, minItems=1), TOKEN_IDS, _list(TOKEN_IDS, minItems=1)],
}
SEED = _integer("Choice i is sampled with seed + i; random if left out")
CHOICES = _integer("Choices per prompt", minimum=1, maximum=128, default=1)
MAX_TOKENS = "Tokens to generate at most; less if the context ends before"

SAMPLING: dict[str, Schema] = {
    "temperature": _number("0: greedy", 0, 2, 1),
    "top_p": _above_zero(_number("Probability mass to sample from", 0, 1, 1)),
    "top_k": _integer("Tokens to sample from; -1 or 0: all", minimum=-1, default=-1),
    "min_p": _number("Least probability relative to the best token's", 0, 1, 0),
    "frequency_penalty": _number("Per occurrence so far", -2, 2, 0),
    "presence_penalty": _number("For any occurrence so far", -2, 2, 0),
    "repetition_penalty": _above_zero(_number("Divides the score of tokens seen before", 0, 2, 1)),
    "ignore_eos": _boolean("Go on behind the end of the answer"),
    "stop_token_ids": {**TOKEN_IDS, "description": "Tokens at which the answer ends; not shown"},
}

OPENAI: dict[str, Schema] = {
    "model": {"type": "string", "minLength": 1},
    **SAMPLING,
    "stream": _boolean("Answer with server-sent events"),
    "stream_options": _closed(
        include_usage=_boolean("A last chunk holds the usage"),
        continuous_usage_stats=_boolean(
            "With include_usage: every chunk holds what its choice has used so far"
        ),
    ),
    "stop": STOP,
    "min_tokens": _integer("No end before so many", minimum=0, default=0),
    "seed": SEED,
    "n": CHOICES,
    "logit_bias": {
        **ANY_OBJECT,
        "description": "By token id",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "user": {**NULLABLE_STRING, "description": "Taken and not used"},
    "metadata": {**ANY_OBJECT, "description": "Taken and not used"},
}

MESSAGE = _closed(
    ["role", "content"],
    role={"enum": ["system", "developer", "user", "assistant"]},
    content={
        "description": "Text, or parts that are joined by line breaks",
        "anyOf": [STRING, _list(_closed(["type", "text"], type={"const": "text"}, text=STRING))],
    },
    name=NULLABLE_STRING,
)

USAGE = _object(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=_object(cached_tokens=INTEGER),
)
FINISH: Schema = {"enum": ["stop", "length", None]}
CHAT_SCORE = _object(token=STRING, logprob=NUMBER, bytes=_list(INTEGER))
CHAT_LOGPROBS = _object(
    content=_list(
        _object(token=STRING, logprob=NUMBER, bytes=_list(INTEGER), top_logprobs=_list(CHAT_SCORE))
    ),
    refusal={"type": "null"},
)
TEXT_LOGPROBS = _object(
    tokens=_list(STRING),
    token_logprobs=_list(NUMBER),
    top_logprobs=_list({"type": "object", "additionalProperties": NUMBER}),
    text_offset=_list(INTEGER),
)
HEAD: dict[str, Schema] = {"id": STRING, "object": STRING, "created": INTEGER, "model": STRING}
RESULT = _object(
    text=STRING,
    output_ids=TOKEN_IDS,
    meta_info=_object(
        id=STRING,
        model=STRING,
        finish_reason=ANY_OBJECT,
        prompt_tokens=INTEGER,
        completion_tokens=INTEGER,
        cached_tokens=INTEGER,
        e2e_latency={**NUMBER, "description": "Seconds"},
        output_token_logprobs=_list(_list({})),
        output_top_logprobs=_list(_list(_list({}))),
    ),
)

SCHEMAS: dict[str, Schema] = {
    "ChatRequest": _closed(
        ["model", "messages"],
        **OPENAI,
        messages=_list(_ref("Message"), minItems=1),
        max_tokens=_integer(f"{MAX_TOKENS}. Default: as many as fit", minimum=1),
        max_completion_tokens=_integer("The newer name of max_tokens", minimum=1),
        logprobs=_boolean("Tell log-probabilities"),
        top_logprobs=_integer("Alternatives for each token", minimum=0, maximum=20, default=0),
        safety_identifier={**NULLABLE_STRING, "description": "Taken and not used"},
        prompt_cache_key={**NULLABLE_STRING, "description": "Taken and not used"},
    ),
    "Message": MESSAGE,
    "ChatCompletion": _object(
        **HEAD,
        choices=_list(
            _object(
                index=INTEGER,
                message=_object(role=STRING, content=STRING, refusal={"type": "null"}),
                logprobs={"anyOf": [CHAT_LOGPROBS, {"type": "null"}]},
                finish_reason=FINISH,
            )
        ),
        usage=_ref("Usage"),
    ),
    "CompletionRequest": _closed(
        ["model", "prompt"],
        **OPENAI,
        prompt=PROMPT,
        max_tokens=_integer(MAX_TOKENS, minimum=1, default=16),
        logprobs=_integer("Tell log-probabilities, with so many alternatives", minimum=0, maximum=20),
    ),
    "TextCompletion": _object(
        **HEAD,
        choices=_list(
            _object(
                index=INTEGER,
                text=STRING,
                logprobs={"anyOf": [TEXT_LOGPROBS, {"type": "null"}]},
                finish_reason=FINISH,
            )
        ),
        usage=_ref("Usage"),
    ),
    "GenerateBody": _closed(
        text={"anyOf": [STRING, _list(STRING, minItems=1), {"type": "null"}]},
        input_ids={
            "description": "Instead of text",
            "anyOf": [TOKEN_IDS, _list(TOKEN_IDS, minItems=1), {"type": "null"}],
        },
        model={**NULLABLE_STRING, "description": "May be left out where one model is registered"},
        sampling_params=_closed(
            **SAMPLING,
            max_new_tokens=_integer(MAX_TOKENS, minimum=1, default=128),
            min_new_tokens=_integer("No end before so many", minimum=0, default=0),
            sampling_seed=SEED,
            n=CHOICES,
            stop=STOP,
        ),
        stream=_boolean("Answer with server-sent events, each with all the text so far"),
        slo=_number("Objective for the time to the first token, in seconds", 0.001, 86_400),
        return_logprob=_boolean("Tell log-probabilities"),
        top_logprobs_num=_integer("Alternatives for each token", minimum=0, maximum=20, default=0),
    ),
    "Generated": {
        "description": "One result, or a list for several prompts or choices",
        "anyOf": [RESULT, _list(RESULT)],
    },
    "Usage": USAGE,
    "ModelList": _object(object=STRING, data=_list(_ref("Model"))),
    "Model": _object(
        id=STRING,
        object=STRING,
        created=INTEGER,
        owned_by=STRING,
        state={"enum": ["ready", "sleeping", "unavailable", "failed"]},
        reason=NULLABLE_STRING,
        context_length={"type": ["integer", "null"]},
        devices=_list(STRING),
    ),
    "Status": _object(status=STRING, reason=STRING),
    "Error": _object(
        error=_object(message=STRING, type=STRING, param=NULLABLE_STRING, code=NULLABLE_STRING),
    ),
}
