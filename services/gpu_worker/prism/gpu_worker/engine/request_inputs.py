"""Requests on their way in, from the worker's messages to SGLang's structures."""

import dataclasses
from array import array

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from prism.common.messages.generation import SamplingParams as WireSamplingParams
from prism.gpu_worker.engine_protocol import Generate


@dataclasses.dataclass(frozen=True)
class StopTokens:
    """What SGLang asks of a request's tokenizer when no text is involved: which tokens end a sequence."""

    eos_token_id: int
    additional_stop_token_ids: frozenset[int]

    @classmethod
    def of(cls, ids: "set[int] | None", vocabulary: int) -> "StopTokens":
        """From a model's end-of-sequence ids; the first id past the vocabulary stands for none."""
        first, *others = sorted(ids or {vocabulary})
        return cls(first, frozenset(others))


def check_prompt(input_ids: list[int], vocabulary: int, fit: int) -> None:
    """Raises ValueError, in words for who sent it, when these tokens can't be a prompt here: of `vocabulary`
    tokens there are, `fit` fit."""
    # Each of these would end the scheduler, and with it everybody's requests.
    if not input_ids:
        raise ValueError("the prompt is empty")
    if min(input_ids) < 0 or max(input_ids) >= vocabulary:
        raise ValueError(f"the prompt has token ids outside of 0 to {vocabulary - 1}")
    if len(input_ids) > fit:
        raise ValueError(f"the prompt has {len(input_ids)} tokens, {fit} fit")


def sampling_params(chosen: WireSamplingParams, vocabulary: int, tokenizer: StopTokens) -> SamplingParams:
    """SGLang's own, normalized. Raises ValueError when they ask for what can't be."""
    if any(not 0 <= token < vocabulary for token in chosen.stop_token_ids):
        raise ValueError(f"stop_token_ids has token ids outside of 0 to {vocabulary - 1}")
    sampling = SamplingParams(
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        min_p=chosen.min_p,
        frequency_penalty=chosen.frequency_penalty,
        presence_penalty=chosen.presence_penalty,
        repetition_penalty=chosen.repetition_penalty,
        min_new_tokens=chosen.min_new_tokens,
        ignore_eos=chosen.ignore_eos,
        stop_token_ids=set(chosen.stop_token_ids) or None,
        logit_bias=chosen.logit_bias,
        sampling_seed=chosen.seed,
    )
    sampling.normalize(tokenizer)
    sampling.verify(vocabulary)
    return sampling


def scheduler_request(message: Generate, sampling: SamplingParams) -> TokenizedGenerateReqInput:
    """The request as SGLang's scheduler takes it from a tokenizer."""
    return TokenizedGenerateReqInput(
        rid=message.rid,
        input_text=None,
        input_ids=array("q", message.input_ids),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
        return_logprob=message.top_logprobs is not None,
        logprob_start_len=-1,
        top_logprobs_num=message.top_logprobs or 0,
        token_ids_logprob=None,
        # Log-probabilities go SGLang's way, which says tokens of others fifty at a time, the first with them.
        stream=message.streamed or message.top_logprobs is not None,
        priority=message.priority,
    )
