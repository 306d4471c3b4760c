"""Sampling parameters of a request, checked, as the workers take them."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.generation import SamplingParams
from prism.gateway.request_fields import Allowed, check_ranges, invalid

SEED_SPACE = 2**31
_TOKEN_ID = re.compile(r"[0-9]{1,18}")
MOST_STOPS = 16
MOST_LOGPROBS = 20

RANGES: Mapping[str, Allowed] = {
    "temperature": Allowed(0, 2),
    "top_p": Allowed(0, 1, above=True),
    "top_k": Allowed(1, 2**31 - 1, also=(-1, 0)),
    "min_p": Allowed(0, 1),
    "frequency_penalty": Allowed(-2, 2),
    "presence_penalty": Allowed(-2, 2),
    "repetition_penalty": Allowed(0, 2, above=True),
    "seed": Allowed(-(2**63), 2**63),
    "sampling_seed": Allowed(-(2**63), 2**63),
    "n": Allowed(1, 128),
    "max_tokens": Allowed(1, 2**31 - 1),
    "max_completion_tokens": Allowed(1, 2**31 - 1),
    "max_new_tokens": Allowed(1, 2**31 - 1),
    "min_tokens": Allowed(0, 2**31 - 1),
    "min_new_tokens": Allowed(0, 2**31 - 1),
    "top_logprobs": Allowed(0, MOST_LOGPROBS),
    "top_logprobs_num": Allowed(0, MOST_LOGPROBS),
}


class SamplingFields(msgspec.Struct, kw_only=True):
    """What all endpoints mean by the same names; each one's own names are translated before."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None


def check_sampling(fields: msgspec.Struct) -> None:
    """Raises PrismError(invalid_request) for a value out of range."""
    check_ranges(msgspec.structs.asdict(fields), RANGES)


def read_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings. Raises PrismError(invalid_request)."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MOST_STOPS:
        raise invalid("stop", f"stop takes at most {MOST_STOPS} strings; got {len(stops)}")
    if not all(stops):
        raise invalid("stop", "a stop string must not be empty")
    return tuple(stops)


def first_seed(seed: int | None) -> int:
    """The seed of the first choice: the one given, brought into 31 bits, else a random one."""
    return secrets.randbelow(SEED_SPACE) if seed is None else seed % SEED_SPACE


def build_sampling(
    fields: SamplingFields,
    *,
    max_tokens: int,
    min_tokens: int | None,
    seed: int,
    vocab_size: int,
    logit_bias: Mapping[str, float] | None = None,
) -> SamplingParams:
    """What a worker is asked for. Raises PrismError(invalid_request) for what only the model's vocabulary and
    context can tell to be wrong."""
    if (min_tokens or 0) > max_tokens:
        raise invalid(
            "min_tokens", f"min_tokens {min_tokens} is more than the {max_tokens} tokens allowed at most"
        )
    stop_token_ids = tuple(fields.stop_token_ids or ())
    check_token_ids("stop_token_ids", stop_token_ids, vocab_size)
    _check_logit_bias(logit_bias or {}, vocab_size)
    chosen: dict[str, Any] = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
        )
        if (value := getattr(fields, name)) is not None
    }
    return SamplingParams(
        max_new_tokens=max_tokens,
        seed=seed,
        top_k=fields.top_k or -1,
        min_new_tokens=min_tokens or 0,
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=stop_token_ids,
        logit_bias=dict(logit_bias) if logit_bias else None,
        **chosen,
    )


def room_for_output(prompt_tokens: int, context_length: int, param: str) -> int:
    """How many tokens fit behind the prompt. Raises PrismError(context_length_exceeded) if none does."""
    room = context_length - prompt_tokens
    if room < 1:
        raise PrismError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"the model's context length is {context_length} tokens; the prompt has {prompt_tokens} "
            "and at least 1 has to be left for the answer",
            param=param,
        )
    return room


def check_token_ids(param: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Raises PrismError(invalid_request) for an id that is not in the vocabulary."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise invalid(param, f"{param}: token id {wrong} is not in the vocabulary (0 to {vocab_size - 1})")


def _check_logit_bias(bias: Mapping[str, float], vocab_size: int) -> None:
    for token, value in bias.items():
        if not (_TOKEN_ID.fullmatch(token) and int(token) < vocab_size):
            raise invalid(
                "logit_bias", f"logit_bias: {token[:40]!r} is not a token id (0 to {vocab_size - 1})"
            )
        if not -100 <= value <= 100:
            raise invalid("logit_bias", f"logit_bias must be at least -100 and at most 100; got {value:g}")
