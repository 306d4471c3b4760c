"""One generation request from a gateway to a worker, and the frames that answer it."""

import msgspec

from prism.common.errors import ErrorBody


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. `temperature` 0 means greedy; `seed` is always set by the gateway."""

    max_new_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[str, float] | None = None


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism.v1.request.<model>.<worker>`; frames go to the message's reply subject.

    `rid` is 32 hex digits, fresh for each attempt (engines abort by prefix of it). `deadline_s` is the
    time left for the whole request when it was sent. `top_logprobs` is None for no log-probabilities,
    else how many alternatives to report beside each chosen token. `replayed_tokens` counts the tokens at
    the end of `input_ids` that an earlier attempt generated already. Of one that is not `streamed` nobody
    waits for single tokens: but for the first, a worker may collect some before it says them. `version` is
    that of the model whose tokens these are: an engine of another one would not understand them.
    """

    rid: str
    model: str
    input_ids: list[int]
    sampling: SamplingParams
    deadline_s: float
    gateway: str = ""
    top_logprobs: int | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    priority: int = 0
    replayed_tokens: int = 0
    streamed: bool = True
    version: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one chosen token and of the best alternatives, as (token id, log-probability)."""

    logprob: float
    top: list[tuple[int, float]] = []


class Finish(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a generation ended: `reason` is stop, length or abort; `matched_token` the stop token, if one."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    matched_token: int | None = None


class TokenFrame(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Some tokens of one request. `seq` counts from 0 without gaps; the last frame has `finish` or `error`.

    A stop token that ended the generation is part of `tokens` (it counts in usage) and named in `finish`.
    Frames for one gateway that were ready at the same moment travel as a JSON array of them, on
    `prism.v1.reply.<gateway>.frames`.
    """

    rid: str
    seq: int
    tokens: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    error: ErrorBody | None = None


class CancelRequest(msgspec.Struct, frozen=True):
    """`prism.v1.cancel.<worker>`: stop working on `rid`; no frame need follow."""

    rid: str
