"""SGLang's scheduler with our ends: requests from the worker's socket in, token outputs out, doze and wake.

Subclassed rather than patched: the request receiver is the only place where requests enter, and the
sender the only place where outputs leave.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from sglang.srt.managers import schedule_policy
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper
from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.server_args import PortArgs, ServerArgs

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.gpu_worker.engine import footprint
from prism.gpu_worker.engine.arrivals import Arrivals
from prism.gpu_worker.engine.layer_gate import LayerGate
from prism.gpu_worker.engine.link import WorkerGone
from prism.gpu_worker.engine.platform import KvMemory, Platform
from prism.gpu_worker.engine.ranks import Link, Ranks
from prism.gpu_worker.engine.request_inputs import (
    StopTokens,
    check_prompt,
    sampling_params,
    scheduler_request,
)
from prism.gpu_worker.engine.token_outputs import OutputSender, TokenStreamer
from prism.gpu_worker.engine.weights import ModelWeights
from prism.gpu_worker.engine_protocol import (
    PLANNED_NEW_TOKENS,
    Abort,
    Arrived,
    Done,
    Doze,
    EngineOptions,
    Generate,
    Outputs,
    PrepareFreeze,
    QuotaSet,
    SetQuota,
    TokenOutput,
    Wake,
)

MEMORY_POLL_S = 0.001
MEMORY_TOLD_S = 0.5

# The worker plans with what requests usually generate; SGLang would keep room for all that they may.
schedule_policy.CLIP_MAX_NEW_TOKENS = PLANNED_NEW_TOKENS


class EngineScheduler(Scheduler):  # type: ignore[misc]
    """One model's scheduler. `kv` and `weights` are what it gives back while dozing.

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
        options: EngineOptions,
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
        self._unstreamed_s = options.unstreamed_s
        self._doze_when_idle: Doze | None = None
        super().__init__(server_args, port_args, platform.gpu, ranks.rank, 0, 0, 0, 0, None)
        self.kv = platform.kv_memory(self)
        self._gate = LayerGate(self.tp_worker.model_runner, weights.end_of, options.wake_lead_s)
        self._arrivals: Arrivals | None = None
        self._arrival: threading.Thread | None = None

    def init_ipc_channels(self, port_args: PortArgs) -> None:
        """Our socket instead of SGLang's ZMQ channels."""
        sender = OutputSender(self.tell)
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
        self.output_streamer = TokenStreamer(**fields, unstreamed_s=self._unstreamed_s)

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
                vocabulary = self.model_config.vocab_size
                sampling = sampling_params(message.sampling, vocabulary, self.tokenizer)
                check_prompt(message.input_ids, vocabulary, self.max_req_input_len)
            except ValueError as problem:
                error = ErrorBody(ErrorCode.INVALID_REQUEST, str(problem))
        if error is not None:
            self.tell([TokenOutput(message.rid, [], "abort", error=error)])
            return
        self.handle_generate_request(scheduler_request(message, sampling))

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
        if self._arrivals is not None and self._arrivals.all_here:
            # What the copies needed is given back now, not when the engine is to doze.
            self._end_arrivals()
        if self._doze_when_idle is not None:
            self.handle_doze(self._doze_when_idle)
        if self._graphs is not None and not self.dozing and not self._gate.closed:
            self._graphs.idle(self.forward_ct, time.monotonic(), exporting=self.weights.exporting)
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

    def tell(self, outputs: list[TokenOutput], unsaid: bool = False) -> None:
        """Send outputs with the engine's load; `unsaid`: there are tokens that wait for a later time."""
        if self.on_primed is not None:
            return
        self._told_load = self.current_load()
        self._told_at = time.monotonic()
        self.link.send(Outputs(outputs, *self._told_load, unsaid))

    def handle_doze(self, request: Doze) -> None:
        """Give back weights and KV memory, as soon as no request is in the engine any more.

        The worker has drained it; what may still be here is the last batch's bookkeeping.
        """
        self._doze_when_idle = None if self.is_fully_idle() else request
        if self._doze_when_idle is None:
            self._transition(request.call, self._doze)
            if self.dozing:
                self.weights.asleep()

    def handle_wake(self, request: Wake) -> None:
        """Take memory again, weights copied back from the image: the last of them while requests may come."""
        if self._graphs is not None:
            self._graphs.begin_anew()
        self._transition(request.call, self._wake)
        if self.dozing:
            self.weights.asleep()
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
        else:
            footprint.note("woken")
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
        unmapped = time.perf_counter()
        self.flush_cache(empty_cache=False)
        self.kv.unmap()
        self.dozing = True
        footprint.note("dozing")
        return {"unmap": unmapped - began, "kv": time.perf_counter() - unmapped}

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
        seconds: dict[str, float] = {}

        kv = self.kv

        def restore() -> None:
            arrivals = self.weights.restore(self._gate.lead_s)
            if arrivals.all_here:
                seconds["copy"] = arrivals.seconds
            else:
                self._arrivals = arrivals
            began = time.perf_counter()
            try:
                kv.map()
            except PrismError:
                give_back_weights()
                raise
            seconds["kv"] = time.perf_counter() - began

        def give_back_weights() -> None:
            arrivals, self._arrivals = self._arrivals, None
            if arrivals is not None:
                arrivals.close()
            self.weights.unmap()

        def undo() -> None:
            kv.unmap()
            give_back_weights()

        self.ranks.together(restore, undo)
        if self._arrivals is not None:
            self._gate.close(self._arrivals)
        self.dozing = False
        if self._arrivals is None:
            # It waits for all that the GPU has to do.
            footprint.note("woken")
        return seconds

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
