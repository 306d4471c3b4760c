"""SGLang's scheduler with our ends: requests from the worker's socket in, token outputs out, doze and wake.

Subclassed rather than patched: the request receiver is the only place where requests enter, and the
sender the only place where outputs leave.
"""

import contextlib
import dataclasses
import math
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput, TokenizedGenerateReqInput
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.messages.generation import SamplingParams as WireSamplingParams
from prism.common.messages.generation import TokenLogprob
from prism.gpu_worker.engine import footprint
from prism.gpu_worker.engine.arrivals import Arrivals
from prism.gpu_worker.engine.layer_gate import LayerGate
from prism.gpu_worker.engine.link import WorkerGone
from prism.gpu_worker.engine.platform import KvMemory, Platform
from prism.gpu_worker.engine.ranks import Link, Ranks
from prism.gpu_worker.engine.weights import ModelWeights
from prism.gpu_worker.engine_protocol import (
    PLANNED_NEW_TOKENS,
    Abort,
    Arrived,
    Done,
    Doze,
    Generate,
    Outputs,
    PrepareFreeze,
    QuotaSet,
    SetQuota,
    TokenOutput,
    Wake,
)

LOWEST_LOGPROB = -1e30
MEMORY_POLL_S = 0.001
MEMORY_TOLD_S = 0.5

# The worker plans with what requests usually generate; SGLang would keep room for all that they may.
schedule_policy.CLIP_MAX_NEW_TOKENS = PLANNED_NEW_TOKENS


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


class EngineScheduler(Scheduler):  # type: ignore[misc]
    """One model's scheduler. `kv` and `weights` are what it gives back while dozing; woken, it takes requests
    `wake_lead_s` seconds before its last weights are there.

    While there is an `on_primed`, what requests say is kept from the worker: it is called when the engine is
    idle, and nothing of them is left in the cache.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        port_args: PortArgs,
        *,
        link: Link,
        weights: ModelWeights,
        platform: Platform,
        ranks: Ranks,
        wake_lead_s: float,
    ) -> None:
        self.link = link
        self.ranks = ranks
        self.weights = weights
        self.kv: KvMemory | None = None
        self.on_primed: Callable[[], None] | None = None
        self.dozing = False
        self._told_load = (0, 0, 0, 0, 0)
        self._told_at = 0.0
        self._graphs = platform.graphs
        self._doze_when_idle: Doze | None = None
        super().__init__(server_args, port_args, platform.gpu, ranks.rank, 0, 0, 0, 0, None)
        self.kv = platform.kv_memory(self)
        self._gate = LayerGate(self.tp_worker.model_runner, weights.end_of, wake_lead_s)
        self._arrivals: Arrivals | None = None
        self._arrival: threading.Thread | None = None

    def init_ipc_channels(self, port_args: PortArgs) -> None:
        """Our socket instead of SGLang's ZMQ channels."""
        sender = _OutputSender(self)
        self.ipc_channels = SchedulerIpcChannels(
            recv_from_tokenizer=self.link,
            recv_from_rpc=None,
            send_to_tokenizer=sender,
            send_to_detokenizer=sender,
            send_metrics_from_scheduler=None,
        )
        self.load_snapshot_writer = None

    def init_tokenizer(self) -> None:
        """No tokenizer: only the stop tokens that one would know."""
        super().init_tokenizer()
        self.tokenizer = StopTokens.of(self.model_config.hf_eos_token_id, self.model_config.vocab_size)

    def init_idle_sleeper(self) -> None:
        """Sleep on our socket while there is nothing to do; other ranks wait for the broadcast of rank 0."""
        self.idle_sleeper = None if self.ranks.rank else IdleSleeper(sockets=[self.link])

    request_receiver: Any

    def init_request_receiver(self) -> None:
        """Receive from the worker."""
        super().init_request_receiver()
        built: Any = self.request_receiver
        fields = {field.name: getattr(built, field.name) for field in dataclasses.fields(built)}
        self.request_receiver = _LinkReceiver(**fields)

    output_streamer: Any

    def init_output_streamer(self) -> None:
        """Say tokens to the worker."""
        super().init_output_streamer()
        built: Any = self.output_streamer
        fields = {field.name: getattr(built, field.name) for field in dataclasses.fields(built)}
        self.output_streamer = _TokenStreamer(**fields)

    def init_request_dispatcher(self) -> None:
        """Our messages beside SGLang's own."""
        super().init_request_dispatcher()
        self._request_dispatcher._mapping[Generate] = self.handle_generate
        self._request_dispatcher._mapping[Abort] = lambda abort: self.abort_request(AbortReq(rid=abort.rid))
        self._request_dispatcher._mapping[Doze] = self.handle_doze
        self._request_dispatcher._mapping[Wake] = self.handle_wake
        self._request_dispatcher._mapping[SetQuota] = self.handle_set_quota
        self._request_dispatcher._mapping[PrepareFreeze] = self.handle_prepare_freeze

    def handle_generate(self, message: Generate) -> None:
        """Queue a request; one that can't be run here is answered with why."""
        error = None
        if self.dozing:
            error = ErrorBody(ErrorCode.MOVED, "the model is asleep", retry=True)
        else:
            try:
                sampling = self._sampling(message.sampling)
                self._check_prompt(message.input_ids)
            except ValueError as problem:
                error = ErrorBody(ErrorCode.INVALID_REQUEST, str(problem))
        if error is not None:
            self.tell([TokenOutput(message.rid, [], "abort", error=error)])
            return
        self.handle_generate_request(_scheduler_request(message, sampling))

    def _check_prompt(self, input_ids: list[int]) -> None:
        # Each of these would end the scheduler, and with it everybody's requests.
        vocabulary = self.model_config.vocab_size
        if not input_ids:
            raise ValueError("the prompt is empty")
        if min(input_ids) < 0 or max(input_ids) >= vocabulary:
            raise ValueError(f"the prompt has token ids outside of 0 to {vocabulary - 1}")
        if len(input_ids) > self.max_req_input_len:
            raise ValueError(f"the prompt has {len(input_ids)} tokens, {self.max_req_input_len} fit")

    def _sampling(self, chosen: WireSamplingParams) -> SamplingParams:
        vocabulary = self.model_config.vocab_size
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
        sampling.normalize(self.tokenizer)
        sampling.verify(vocabulary)
        return sampling

    def on_idle(self) -> None:
        """Tell the worker that the last request is really out of the engine, then sleep."""
        if not self.is_fully_idle():
            self._wait_for_memory()
            return
        if self.on_primed is not None:
            # Its answer may come from weights that were not all there yet.
            self.flush_cache(empty_cache=False)
            primed, self.on_primed = self.on_primed, None
            primed()
        if self.current_load() != self._told_load:
            self.tell([])
        if self._doze_when_idle is not None:
            self.handle_doze(self._doze_when_idle)
        if self._graphs is not None and not self.dozing and not self._gate.closed:
            self._graphs.idle(self.forward_ct, time.monotonic())
        super().on_idle()

    def _wait_for_memory(self) -> None:
        """Requests are here, and nothing runs: the quota has no room for them yet. That is no standstill."""
        if time.monotonic() - self._told_at > MEMORY_TOLD_S:
            self.tell([])
        time.sleep(MEMORY_POLL_S)

    def process_batch_result(self, batch: Any, result: Any) -> None:
        """Pass results on; a step without output (a chunk of a long prefill) shows as progress."""
        super().process_batch_result(batch, result)
        if self.forward_ct != self._told_load[3]:
            self.tell([])

    def current_load(self) -> tuple[int, int, int, int, int]:
        """Requests running, requests waiting, KV tokens held by requests, forward passes so far, KV tokens of
        cached prefixes."""
        held = self.kv.held_tokens() if self.kv is not None else 0
        cached = int(self.tree_cache.evictable_size())
        return len(self.running_batch.reqs), len(self.waiting_queue), held, self.forward_ct, cached

    def tell(self, outputs: list[TokenOutput]) -> None:
        """Send outputs with the engine's load."""
        if self.on_primed is not None:
            return
        self._told_load = self.current_load()
        self._told_at = time.monotonic()
        self.link.send(Outputs(outputs, *self._told_load))

    def handle_doze(self, request: Doze) -> None:
        """Give back weights and KV memory, as soon as no request is in the engine any more.

        The worker has drained it; what may still be here is the last batch's bookkeeping.
        """
        self._doze_when_idle = None if self.is_fully_idle() else request
        if self._doze_when_idle is None:
            self._transition(request.call, self._doze)

    def handle_wake(self, request: Wake) -> None:
        """Take memory again, weights copied back from the image: the last of them while requests may come."""
        self._transition(request.call, self._wake)
        if self._arrivals is not None:
            arrivals = (self._arrivals,)
            self._arrival = threading.Thread(
                target=self._tell_arrival, args=arrivals, name="arrival", daemon=True
            )
            self._arrival.start()

    def _tell_arrival(self, arrivals: Arrivals) -> None:
        error = None
        try:
            arrivals.wait()
        except Exception as problem:
            error = ErrorBody(ErrorCode.INTERNAL, f"copying the weights back failed: {problem}", retry=True)
        with contextlib.suppress(WorkerGone):
            self.link.send(Arrived({"copy": arrivals.seconds}, error))

    def handle_set_quota(self, request: SetQuota) -> None:
        """Bound the KV cache, between two steps."""
        assert self.kv is not None
        held, retracted = self.kv.set_limit(request.kv_bytes)
        self.tell([])
        self.link.send(QuotaSet(request.call, held, self.kv.limit_tokens, retracted))

    def handle_prepare_freeze(self, request: PrepareFreeze) -> None:
        """Let go of what would slow a thaw down; then sleep, with no call to the device, until spoken to."""
        self._transition(request.call, self._prepare_freeze)
        if self.dozing:
            self.link.wait()

    def _transition(self, call: int, run: Callable[[], dict[str, float]]) -> None:
        try:
            self.link.send(Done(call, run(), under_way=self._arrivals is not None))
        except PrismError as error:
            self.link.send(Done(call, {}, error.body))

    def _doze(self) -> dict[str, float]:
        if self.dozing:
            return {}
        began = time.perf_counter()
        assert self.kv is not None
        self.ranks.together(lambda: self.weights.require_image(wait=self.ranks.rank > 0))
        self._end_arrivals()
        self.weights.unmap()
        self.flush_cache(empty_cache=False)
        self.kv.unmap()
        self.dozing = True
        footprint.note("dozing")
        return {"unmap": time.perf_counter() - began}

    def _prepare_freeze(self) -> dict[str, float]:
        if not self.dozing:
            raise PrismError(ErrorCode.INTERNAL, "asked to be frozen while awake", retry=True)
        began = time.perf_counter()
        self.weights.unpin()
        return {"unpin": time.perf_counter() - began}

    def _wake(self) -> dict[str, float]:
        if not self.dozing:
            return {}
        assert self.kv is not None
        began = time.perf_counter()

        def restore() -> None:
            arrivals = self.weights.restore(self._gate.lead_s)
            self._arrivals = None if arrivals.all_here else arrivals

        def undo() -> None:
            arrivals, self._arrivals = self._arrivals, None
            if arrivals is not None:
                arrivals.close()
            self.weights.unmap()

        self.ranks.together(restore, undo)
        copied = time.perf_counter()
        if self._arrivals is not None:
            self._gate.close(self._arrivals)
        self.kv.map()
        self.dozing = False
        footprint.note("woken")
        return {"copy": copied - began, "kv": time.perf_counter() - copied}

    def _end_arrivals(self) -> None:
        arrivals, self._arrivals = self._arrivals, None
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.join()
        if arrivals is not None:
            arrivals.wait()
            self._gate.open()
            arrivals.close()


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class _LinkReceiver(SchedulerRequestReceiver):  # type: ignore[misc]
    """Takes the worker's messages where SGLang would read ZMQ."""

    def _pull_raw_reqs(self) -> list[Any]:
        messages: list[Any] = self.recv_from_tokenizer.receive_waiting()
        return messages


def _scheduler_request(message: Generate, sampling: SamplingParams) -> TokenizedGenerateReqInput:
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
        stream=True,
        priority=message.priority,
    )


class _OutputSender:
    """Translates what SGLang sends to its tokenizer and detokenizer."""

    def __init__(self, scheduler: EngineScheduler) -> None:
        self._scheduler = scheduler
        self.socket = None

    def send_tokens(self, outputs: list[TokenOutput]) -> None:
        """Pass on what requests generated."""
        self._scheduler.tell(outputs)

    def send_output(self, output: object, recv_obj: object = None) -> None:
        """Pass on token outputs and aborts; nothing else has a receiver here."""
        if isinstance(output, BatchTokenIDOutput):
            self._scheduler.tell([_token_output(output, index) for index in range(len(output.rids))])
        elif isinstance(output, AbortReq):
            self._scheduler.tell([TokenOutput(output.rid, [], "abort")])


@dataclasses.dataclass(kw_only=True, slots=True)
class _TokenStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """Says new tokens to our sender, without the thirty lists that SGLang's detokenizer would need at each
    step. With log-probabilities it goes SGLang's way."""

    def _stream_output_generation(
        self, reqs: list[Any], return_logprob: bool, skip_req: Any = None, is_idle_batch: bool = False
    ) -> None:
        if return_logprob or is_idle_batch:
            # A dataclass with slots is another class than the one that a bare super() would mean.
            SchedulerOutputStreamer._stream_output_generation(
                self, reqs, return_logprob, skip_req, is_idle_batch
            )
            return
        outputs = [
            _new_tokens(req)
            for req in reqs
            # With overlap a finished request comes here once more.
            if req is not skip_req and not (req.finished() and req.finished_output)
        ]
        if outputs:
            self.send_to_detokenizer.send_tokens(outputs)


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
