"""A request on this worker: what it promises, what admission sees of it, whether memory suffices."""

import sys
import time
from math import inf

import msgspec

from prism.common.errors import ErrorBody, ErrorCode
from prism.common.messages.generation import GenerateRequest, SamplingParams
from prism.gpu_worker.engine_protocol import PLANNED_NEW_TOKENS
from prism.gpu_worker.frames import FrameStream
from prism.gpu_worker.model_instance import ModelInstance
from prism.gpu_worker.serving_record import Objectives
from prism.scheduling.admission import QueuedRequest

INPUT_MARGIN = 6
"""Tokens that SGLang's longest prompt is shorter than the context."""


class RunningRequest:
    """A request that an engine has, or waits to have."""

    def __init__(self, request: GenerateRequest, frames: FrameStream, instance: ModelInstance) -> None:
        self.request = request
        self.frames = frames
        self.instance = instance
        self.objectives = Objectives(request, instance.spec)
        self.arrived_at = time.monotonic()
        self.expires = self.arrived_at + request.deadline_s
        self.generated = 0
        self.released_at = 0.0
        self.first_token_at: float | None = None

    @property
    def kv_tokens(self) -> int:
        """What it will probably hold of its engine's KV cache in the end."""
        may_generate = self.request.sampling.max_new_tokens
        remaining = self.instance.record.expected.remaining(may_generate, self.generated)
        planned = min(may_generate, PLANNED_NEW_TOKENS)
        return len(self.request.input_ids) + max(planned, self.generated + remaining)


def queued_request(entry: RunningRequest) -> QueuedRequest:
    """What admission sees of it."""
    request, sampling = entry.request, entry.request.sampling
    expected = entry.instance.record.expected.tokens(sampling.max_new_tokens)
    if expected is not None:
        # Less than that, its engine does not start it with.
        expected = max(expected, PLANNED_NEW_TOKENS)
    return QueuedRequest(
        rid=request.rid,
        model=request.model,
        arrival_s=entry.arrived_at,
        prompt_tokens=len(request.input_ids),
        max_new_tokens=sampling.max_new_tokens,
        deadline_s=entry.expires,
        priority=request.priority,
        ttft_slo_s=inf if entry.objectives.ttft_s is None else entry.objectives.ttft_s,
        expected_new_tokens=expected,
    )


def beyond_memory(request: GenerateRequest, instance: ModelInstance) -> ErrorBody | None:
    """Why its engine could never start it, however much KV memory others gave up; None if it could."""
    most = instance.most_kv_tokens
    prompt = len(request.input_ids)
    planned = min(request.sampling.max_new_tokens, PLANNED_NEW_TOKENS)
    if most is None or prompt + planned <= most:
        return None
    return ErrorBody(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"{prompt} prompt tokens and room for {planned} more are {prompt + planned}; there is KV memory for "
        f"{most} tokens of {instance.name} at most ({instance.memory.most_kv_bytes / 1e6:.1f} MB here). "
        "Shorten the prompt, or have the model's max_memory_pool_size or the worker's memory raised",
    )


def going_on(request: GenerateRequest, instance: ModelInstance) -> GenerateRequest | None:
    """A request that has tokens from elsewhere, with no more to come than there can be room for; None when
    that is nothing, and its answer ends by its length. It was accepted once, and is refused nowhere."""
    room = (instance.facts.context_length or sys.maxsize) - INPUT_MARGIN - len(request.input_ids)
    if instance.most_kv_tokens is not None:
        room = min(room, instance.most_kv_tokens - len(request.input_ids))
    if room <= 0:
        return None
    return msgspec.structs.replace(request, sampling=_at_most(request.sampling, room))


def within_memory(request: GenerateRequest, instance: ModelInstance) -> SamplingParams:
    """Ends at the length that there can be memory for, as at the model's context length."""
    sampling, most = request.sampling, instance.most_kv_tokens
    return sampling if most is None else _at_most(sampling, most - len(request.input_ids))


def _at_most(sampling: SamplingParams, room: int) -> SamplingParams:
    if sampling.max_new_tokens <= room:
        return sampling
    return msgspec.structs.replace(
        sampling, max_new_tokens=room, min_new_tokens=min(sampling.min_new_tokens, room)
    )
