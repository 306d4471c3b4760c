"""POST /generate, as the Prism prototype and SGLang speak it: wire types, validation, form of the answer."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.datastructures import Headers

from prism.common.errors import PrismError
from prism.gateway.completions_api import encode_prompts
from prism.gateway.plan import Choice, Plan, Planner, Servable, Wanted
from prism.gateway.request_fields import Allowed, check_ranges, invalid, read_json, refuse_unsupported
from prism.gateway.sampling import SamplingFields, check_sampling, read_stops
from prism.gateway.slo_headers import LEAST_MS, MOST_MS
from prism.gateway.text_assembler import Ending, Piece

DEFAULT_MAX_NEW_TOKENS = 128
PARAMS = "sampling_params"
OBJECTIVE_S = Allowed(LEAST_MS / 1000, MOST_MS // 1000)


class GenerateSampling(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params`."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None


class GenerateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body. `slo` is the time to the first token in seconds. Parameters typed Any are known and not
    supported: see `HARMLESS`."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    model: str | None = None
    sampling_params: GenerateSampling | None = None
    stream: bool | None = None
    slo: float | None = None
    return_logprob: bool | None = None
    top_logprobs_num: int | None = None
    logprob_start_len: Any = None
    lora_path: Any = None
    return_routed_experts: Any = None


# What sglang.bench_serving sends with every request, whether it is wanted or not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "logprob_start_len": (-1,),
    "lora_path": (),
    "return_routed_experts": (False,),
}


async def plan_generate(body: bytes, headers: Headers, planner: Planner) -> Plan:
    """Read, check and tokenise a request. Raises PrismError for whatever is wrong with it."""
    request = read_json(body, GenerateBody)
    refuse_unsupported(msgspec.structs.asdict(request), HARMLESS)
    sampling = request.sampling_params or GenerateSampling()
    check_sampling(request)
    check_ranges({"slo": request.slo}, {"slo": OBJECTIVE_S})
    try:
        check_sampling(sampling)
        stops = read_stops(sampling.stop)
    except PrismError as error:
        raise PrismError(error.code, f"{PARAMS}.{error.message}", param=f"{PARAMS}.{error.param}") from error
    if (request.text is None) == (request.input_ids is None):
        raise invalid("text", "give exactly one of text and input_ids")
    if request.top_logprobs_num and not request.return_logprob:
        raise invalid("top_logprobs_num", "top_logprobs_num needs return_logprob to be true")
    model = await planner.servable(request.model or planner.registry.only_model())
    prompts, param, batch = await _prompts(model, request)
    asked = sampling.max_new_tokens
    request_id = secrets.token_hex(16)
    wanted = Wanted(
        request=request_id,
        fields=sampling,
        prompt_param=param,
        streamed=bool(request.stream or stops),
        max_tokens=DEFAULT_MAX_NEW_TOKENS if asked is None else asked,
        min_tokens=sampling.min_new_tokens,
        n=sampling.n or 1,
        seed=sampling.sampling_seed,
        top_logprobs=(request.top_logprobs_num or 0) if request.return_logprob else None,
        ttft_slo_ms=None if request.slo is None else request.slo * 1000,
    )
    choices = planner.choices(model, prompts, wanted, headers)
    many = batch or len(choices) > 1
    if many:
        for index, choice in enumerate(choices):
            choice.job = replace(choice.job, request=f"{request_id}-{index}")
    answer = GenerateAnswer(
        model,
        many=many,
        top_logprobs=wanted.top_logprobs,
        clock=planner.clock,
    )
    return Plan(request_id, model, choices, stops, bool(request.stream), answer, continues=True)


async def _prompts(model: Servable, request: GenerateBody) -> tuple[list[list[int]], str, bool]:
    """Token ids of the prompts, the name of the field they came from, whether it held a batch."""
    if request.text is not None:
        batch = not isinstance(request.text, str)
        return await encode_prompts(model, request.text, "text"), "text", batch
    ids = request.input_ids or []
    batch = any(isinstance(item, list) for item in ids)
    return await encode_prompts(model, ids, "input_ids"), "input_ids", batch


class GenerateAnswer:
    """SGLang's object: one, or a list of them for a batch. Streams repeat all that there is so far."""

    repeats = True

    def __init__(
        self, model: Servable, *, many: bool, top_logprobs: int | None, clock: Callable[[], float]
    ) -> None:
        self._model = model
        self._many = many
        self._top_logprobs = top_logprobs
        self._clock = clock
        self._began = clock()

    def opening(self, choices: Sequence[Choice]) -> list[object]:
        """Nothing."""
        return []

    def events(self, index: int, choice: Choice, piece: Piece) -> list[object]:
        """The choice so far."""
        if not piece.tokens and piece.ending is None:
            return []
        told = self._told(choice)
        return [{"index": index, **told} if self._many else told]

    def closing(self, choices: Sequence[Choice]) -> list[object]:
        """Nothing."""
        return []

    def whole(self, choices: Sequence[Choice]) -> object:
        """The choice, or the list of them."""
        told = [self._told(choice) for choice in choices]
        return told if self._many else told[0]

    def _told(self, choice: Choice) -> dict[str, Any]:
        ending = choice.ending
        meta: dict[str, Any] = {
            "id": choice.job.request,
            "model": self._model.spec.model_name,
            "finish_reason": _finish_reason(ending, len(choice.tokens)),
            "prompt_tokens": len(choice.job.input_ids),
            "completion_tokens": len(choice.tokens),
            "cached_tokens": min(ending.cached_tokens, len(choice.job.input_ids)) if ending else 0,
            "e2e_latency": self._clock() - self._began,
        }
        if self._top_logprobs is not None:
            meta["output_token_logprobs"] = [
                [score.score.logprob, score.token, None] for score in choice.scores
            ]
        if self._top_logprobs:
            meta["output_top_logprobs"] = [
                [[logprob, token, None] for token, logprob in score.score.top] for score in choice.scores
            ]
        return {"text": choice.text, "output_ids": choice.tokens, "meta_info": meta}


def _finish_reason(ending: Ending | None, tokens: int) -> dict[str, Any] | None:
    if ending is None:
        return None
    if ending.reason == "length":
        return {"type": "length", "length": tokens}
    return {"type": ending.reason, "matched": ending.matched}
