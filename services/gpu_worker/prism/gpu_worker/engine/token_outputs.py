"""What requests have said, from SGLang's structures to the worker's messages."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from prism.common.errors import ErrorBody, ErrorCode
from prism.common.messages.generation import TokenLogprob
from prism.gpu_worker.engine_protocol import TokenOutput

LOWEST_LOGPROB = -1e30


class OutputSender:
    """Translates what SGLang sends to its tokenizer and detokenizer."""

    def __init__(self, tell: Callable[[list[TokenOutput], bool], None]) -> None:
        self._tell = tell
        self.socket = None

    def send_tokens(self, outputs: list[TokenOutput], unsaid: bool) -> None:
        """Pass on what requests generated; `unsaid`: there is more that waits for a later time."""
        self._tell(outputs, unsaid)

    def send_output(self, output: object, recv_obj: object = None) -> None:
        """Pass on token outputs and aborts; nothing else has a receiver here."""
        if isinstance(output, BatchTokenIDOutput):
            self._tell([_token_output(output, index) for index in range(len(output.rids))], False)
        elif isinstance(output, AbortReq):
            self._tell([TokenOutput(output.rid, [], "abort")], False)


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """Says new tokens to our sender, without the thirty lists that SGLang's detokenizer would need at each
    step. What has log-probabilities goes SGLang's way.

    Of requests that are not streamed the first token is said at once, what comes after it `unstreamed_s`
    seconds after they were last said, all together, or with the end.
    """

    unstreamed_s: float
    _said_at: float = dataclasses.field(default_factory=time.monotonic)

    def _stream_output_generation(
        self, reqs: list[Any], return_logprob: bool, skip_req: Any = None, is_idle_batch: bool = False
    ) -> None:
        with_logprobs = [req for req in reqs if req.return_logprob] if return_logprob else []
        if with_logprobs or is_idle_batch:
            # A dataclass with slots is another class than the one that a bare super() would mean.
            SchedulerOutputStreamer._stream_output_generation(
                self, with_logprobs, return_logprob, skip_req, is_idle_batch
            )
        now = time.monotonic()
        all_now = now - self._said_at >= self.unstreamed_s
        outputs, unsaid = [], False
        for req in reqs:
            # With overlap a finished request comes here once more.
            over = req.finished() and req.finished_output
            if over or req is skip_req or (return_logprob and req.return_logprob):
                continue
            if req.stream or not req.send_token_offset or req.finished():
                outputs.append(_new_tokens(req))
            elif all_now:
                # Only now: most of what is said between two times is of others.
                self._said_at = now
                outputs.append(_new_tokens(req))
            else:
                unsaid = True
        if outputs or unsaid:
            self.send_to_detokenizer.send_tokens(outputs, unsaid)


def _new_tokens(req: Any) -> TokenOutput:
    reason: dict[str, Any] = {}
    if req.finished():
        req.finished_output = True
        if req.finished_len is None:
            req.finished_len = len(req.output_ids)
        reason = req.finished_reason.to_json()
    said = req.output_ids_through_stop
    tokens = list(said[req.send_token_offset :])
    req.send_token_offset = len(said)
    return _said(req.rid, tokens, reason, len(req.origin_input_ids), len(said), req.cached_tokens)


def _token_output(batch: BatchTokenIDOutput, index: int) -> TokenOutput:
    said = _said(
        batch.rids[index],
        list(batch.output_ids[index]),
        batch.finished_reasons[index] or {},
        batch.prompt_tokens[index],
        batch.completion_tokens[index],
        batch.cached_tokens[index],
    )
    logprobs = _logprobs(batch, index)
    return said if logprobs is None else msgspec.structs.replace(said, logprobs=logprobs)


def _said(
    rid: str, tokens: list[int], reason: dict[str, Any], prompt: int, completion: int, cached: int
) -> TokenOutput:
    finish = str(reason.get("type", ""))
    matched = reason.get("matched")
    return TokenOutput(
        rid=rid,
        tokens=tokens,
        finish=finish,
        matched_token=matched if isinstance(matched, int) else None,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        error=_abort_error(reason) if finish == "abort" else None,
    )


def _logprobs(batch: BatchTokenIDOutput, index: int) -> list[TokenLogprob] | None:
    if not batch.output_token_logprobs_val or not batch.output_token_logprobs_val[index]:
        return None
    chosen = batch.output_token_logprobs_val[index]
    tops = zip(batch.output_top_logprobs_val[index], batch.output_top_logprobs_idx[index], strict=True)
    alternatives = [
        [(int(token), _finite(value)) for value, token in zip(values or [], tokens or [], strict=True)]
        for values, tokens in tops
    ]
    alternatives += [[]] * (len(chosen) - len(alternatives))
    return [TokenLogprob(_finite(value), top) for value, top in zip(chosen, alternatives, strict=True)]


def _finite(value: float) -> float:
    # JSON has no infinities; a log-probability as low as this says the same.
    return float(value) if math.isfinite(value) else LOWEST_LOGPROB


def _abort_error(reason: dict[str, Any]) -> ErrorBody | None:
    status = reason.get("status_code")
    if status is None:
        return None
    message = str(reason.get("message", "aborted by the engine"))
    if int(status) == 400:
        return ErrorBody(ErrorCode.INVALID_REQUEST, message)
    return ErrorBody(ErrorCode.OVERLOADED, message, retry=True)
