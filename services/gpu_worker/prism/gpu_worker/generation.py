"""The requests on this worker, from the bus to an engine and back: one queue for all models.

Owns every request here; an engine only knows the ones released to it. Each request ends with exactly one
last frame.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from math import inf

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.messages.generation import Finish, GenerateRequest
from prism.common.messages.models import ModelState, same_version
from prism.common.telemetry import about
from prism.gpu_worker.engine_protocol import Generate, Outputs, TokenOutput
from prism.gpu_worker.frames import FramePublisher, FrameStream
from prism.gpu_worker.model_instance import ModelInstance
from prism.gpu_worker.request_queue import RequestQueue
from prism.gpu_worker.running_request import (
    RunningRequest,
    beyond_memory,
    going_on,
    queued_request,
    within_memory,
)
from prism.gpu_worker.serving_record import objective_s
from prism.scheduling.admission import (
    SHORTEST_WAIT_S,
    AdmissionPolicy,
    Bounds,
    EngineCapacity,
    PrefillBacklog,
)

log = logging.getLogger(__name__)

ABORT_REPEAT_S = 0.1
ABORT_ATTEMPTS = 50


class GenerationRequests:
    """Queued and running requests. `pump` releases what admission selects."""

    def __init__(
        self,
        publisher: FramePublisher,
        admission: AdmissionPolicy,
        find: Callable[[str], ModelInstance | None],
        spawn: Callable[..., asyncio.Task[None]],
        max_running_requests: int,
        pass_tokens: int,
        bounds: Bounds,
        on_demand: Callable[[], None],
    ) -> None:
        self._publisher = publisher
        self._admission = admission
        self._find = find
        self._spawn = spawn
        self._max_running_requests = max_running_requests
        self._pass_tokens = pass_tokens
        self._queued: dict[str, RunningRequest] = {}
        self._entries = RequestQueue()
        self._running: dict[str, RunningRequest] = {}
        self._of_model: dict[str, dict[str, RunningRequest]] = {}
        self._bounds = bounds
        self._on_demand = on_demand
        self._backlog = PrefillBacklog()
        self._again: asyncio.Handle | None = None
        self._aborting: set[str] = set()
        self._changed = asyncio.Event()

    def arrive(self, request: GenerateRequest, reply: str) -> None:
        """Take a request from the bus, or answer at once why not."""
        frames = FrameStream(self._publisher, reply, request.rid, request.gateway)
        instance = self._find(request.model)
        if instance is None or instance.state is not ModelState.ACTIVE:
            frames.fail(ErrorBody(ErrorCode.MOVED, f"{request.model} is not served here now", retry=True))
            return
        if not same_version(request.version, instance.version):
            what = f"another version of {request.model} than this request is for is served here"
            frames.fail(ErrorBody(ErrorCode.MOVED, what, retry=True))
            return
        if request.rid in self._queued or request.rid in self._running:
            log.warning("a request arrived twice", extra=about(rid=request.rid, model=request.model))
            return
        if request.replayed_tokens:
            shortened = going_on(request, instance)
            if shortened is None:
                frames.finish([], None, Finish("length", len(request.input_ids), 0))
                return
            request = shortened
        if (refusal := beyond_memory(request, instance)) is not None:
            frames.fail(refusal)
            return
        entry = self._queued[request.rid] = RunningRequest(request, frames, instance)
        self._entries.add(queued_request(entry))
        # The gateway waits for tokens with patience only once it knows that the request is here.
        frames.alive()
        self._on_demand()
        self._pump_soon()

    def refuse(self, rid: str, reply: str, error: ErrorBody) -> None:
        """Answer a request that could not be read."""
        FrameStream(self._publisher, reply, rid).fail(error)

    def cancel(self, rid: str) -> None:
        """Forget a queued request, abort a running one; unknown ones are done already."""
        waiting = self._queued.pop(rid, None)
        if waiting is not None:
            self._entries.remove(rid)
            waiting.frames.fail(ErrorBody(ErrorCode.CANCELLED, "cancelled"))
            self._note_change(waiting.instance)
        elif rid in self._running and rid not in self._aborting:
            self._aborting.add(rid)
            self._spawn(self._abort_until_gone(rid), name=f"abort {rid}")

    async def _abort_until_gone(self, rid: str) -> None:
        # An abort that reaches a scheduler between two of its own bookkeeping steps can be lost.
        for _ in range(ABORT_ATTEMPTS):
            running = self._running.get(rid)
            if running is None or running.instance.engine is None:
                break
            try:
                running.instance.engine.abort(rid)
            except PrismError:
                break
            await self._wait_for_change(ABORT_REPEAT_S)
        self._aborting.discard(rid)

    async def _wait_for_change(self, timeout_s: float) -> None:
        changed = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await changed.wait()
        except TimeoutError:
            return

    def _note_change(self, instance: ModelInstance) -> None:
        if not self.count(instance.name):
            instance.idle_since = time.monotonic()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _pump_soon(self) -> None:
        """Once all that has arrived is in the queue: what is released together is prefilled together."""
        if self._again is not None:
            self._again.cancel()
        self._again = asyncio.get_running_loop().call_soon(self.pump)

    def pump(self) -> None:
        """Release every queued request that admission lets start now, and look again when it says."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if not self._entries:
            return
        now = time.monotonic()
        engines = self._capacities(now)
        admitted = self._admission.select(list(self._entries), engines, self._backlog.work(now), now)
        for rid in admitted.rids:
            queued = self._entries.remove(rid)
            if self._release(self._queued.pop(rid), now):
                engine = engines[queued.model]
                self._backlog.released(
                    rid,
                    queued.model,
                    queued.prompt_tokens,
                    engine.prefill_cost,
                    now,
                    due_s=queued.first_token_due_s,
                    overaged=self._bounds.waited(queued, engine, now) > 0,
                )
        if admitted.again_at_s is not None and self._entries:
            # The loop's clock is the one that `now` is on.
            again_at = max(admitted.again_at_s, now + SHORTEST_WAIT_S)
            self._again = asyncio.get_running_loop().call_at(again_at, self.pump)

    def _release(self, entry: RunningRequest, now: float) -> bool:
        request = entry.request
        assert entry.instance.engine is not None
        entry.released_at = now
        self._running[request.rid] = entry
        mine = self._of_model.setdefault(request.model, {})
        if not mine:
            entry.instance.busy_since = now
        mine[request.rid] = entry
        entry.instance.record.released(now - entry.arrived_at)
        try:
            entry.instance.engine.generate(
                Generate(
                    request.rid,
                    request.input_ids,
                    within_memory(request, entry.instance),
                    request.top_logprobs,
                    request.priority,
                    request.streamed,
                )
            )
        except PrismError as error:
            self._forget_running(request.rid)
            entry.frames.fail(error.body)
            return False
        return True

    def _forget_running(self, rid: str) -> RunningRequest:
        entry = self._running.pop(rid)
        del self._of_model[entry.request.model][rid]
        self._backlog.prefilled(rid, time.monotonic())
        return entry

    def _capacities(self, now: float) -> dict[str, EngineCapacity]:
        """Of every engine that has requests here: those that decode bound the prefill of the others."""
        working = {model for model, running in self._of_model.items() if running}
        return {model: self._capacity(model, now) for model in self._entries.models() | working}

    def _capacity(self, model: str, now: float) -> EngineCapacity:
        instance = self._find(model)
        if instance is None or instance.ready is None:
            return EngineCapacity(0, 0, 0, False)
        mine = self._of_model.get(model, {}).values()
        decoding = [running for running in mine if running.first_token_at is not None]
        promised = [running.objectives.tpot_s for running in decoding]
        if not decoding:
            promised.append(objective_s(instance.spec.tpot_slo_ms))
        record = instance.record
        waiting = self._backlog.open_pass(model, now)
        return EngineCapacity(
            running=len(mine),
            max_running=self._max_running_requests,
            kv_free_tokens=instance.memory.kv_tokens - sum(running.kv_tokens for running in mine),
            accepting=instance.state is ModelState.ACTIVE,
            prefill_tokens_per_s=record.prefill.tokens_per_s,
            prefill_fixed_s=record.prefill.fixed_s,
            decoding=len(decoding),
            decode_step_s=record.step.seconds or 0.0,
            tpot_slo_s=min((tpot_s for tpot_s in promised if tpot_s is not None), default=inf),
            decode_alone_s=record.step_alone.seconds or 0.0,
            pass_tokens=self._pass_tokens,
            open_tokens=waiting.tokens,
            open_due_s=waiting.due_s,
            busy_since_s=instance.busy_since,
        )

    def kv_tokens(self, model: str) -> tuple[int, int]:
        """KV tokens that requests of `model` will probably take: those that run, and all of them."""
        running = sum(entry.kv_tokens for entry in self._of_model.get(model, {}).values())
        return running, running + self._entries.tokens(model)

    def on_outputs(self, instance: ModelInstance, message: Outputs) -> None:
        """Tokens of an engine on to their gateways."""
        now = time.monotonic()
        self._learn(instance, message, now)
        began = False
        for output in message.outputs:
            running = self._running.get(output.rid)
            if running is None:
                continue
            if output.tokens and running.first_token_at is None:
                self._began(running, now)
                began = True
            running.generated += len(output.tokens)
            instance.generated_tokens += len(output.tokens)
            if output.finish:
                self._finish(running, output)
            else:
                running.frames.tokens(output.tokens, output.logprobs)
        if any(output.finish for output in message.outputs):
            self._note_change(instance)
            self._on_demand()
            self.pump()
        elif began:
            # A pass is done, perhaps before it was thought to be: the next ones may go.
            self.pump()

    def _learn(self, instance: ModelInstance, message: Outputs, now: float) -> None:
        """How long the step took that this message tells of."""
        tokens, released_at, decoded = 0, now, message.unsaid
        for output in message.outputs:
            running = self._running.get(output.rid)
            if running is None or not output.tokens:
                continue
            if running.first_token_at is None:
                tokens += max(1, len(running.request.input_ids) - output.cached_tokens)
                released_at = min(released_at, running.released_at)
            else:
                decoded = True
        prefilled = (tokens, released_at) if tokens else None
        waited_for_weights = released_at < instance.weights_arrived_at
        at_work = sum(1 for running in self._of_model.values() if running)
        instance.record.stepped(
            now,
            message.steps,
            prefilled,
            decoded=decoded,
            at_work=at_work,
            pass_tokens=self._pass_tokens,
            held_back=waited_for_weights,
        )

    def _began(self, running: RunningRequest, now: float) -> None:
        running.first_token_at = now
        self._backlog.prefilled(running.request.rid, now)
        # What was generated elsewhere had its first token there.
        if not running.request.replayed_tokens:
            running.instance.record.first_token(now - running.arrived_at, running.objectives)

    def _finish(self, running: RunningRequest, output: TokenOutput) -> None:
        self._forget_running(output.rid)
        request = running.request
        running.instance.prompt_tokens += len(request.input_ids)
        if output.error is not None:
            running.frames.fail(output.error)
        elif output.finish == "abort" and output.rid not in self._aborting:
            # SGLang gives up the last request that runs when even that one has no memory left.
            running.frames.fail(
                ErrorBody(ErrorCode.MOVED, f"{request.model} ran out of KV memory here", retry=True)
            )
        elif output.finish == "abort":
            running.frames.fail(ErrorBody(ErrorCode.CANCELLED, "cancelled"))
        else:
            began_at = running.first_token_at or time.monotonic()
            running.instance.record.finished(
                running.generated, time.monotonic() - began_at, running.objectives
            )
            finish = Finish(
                output.finish,
                output.prompt_tokens or len(request.input_ids),
                output.completion_tokens or running.generated,
                output.cached_tokens,
                output.matched_token,
            )
            running.frames.finish(output.tokens, output.logprobs, finish)

    def count(self, model: str) -> int:
        """Requests of `model` here, queued and running."""
        return self.queued(model) + len(self._of_model.get(model, ()))

    def working_since(self, instance: ModelInstance) -> float | None:
        """Since when its engine has had the oldest of its requests, None when it has none."""
        mine = self._of_model.get(instance.name, {}).values()
        return min((running.released_at for running in mine), default=None)

    def queued(self, model: str) -> int:
        """Requests of `model` that no engine has yet."""
        return self._entries.count(model)

    def send_away_queued(self, model: str) -> None:
        """Answer every queued request of `model` with moved: its gateway finds it another place."""
        for rid in self._entries.ids(model):
            self._entries.remove(rid)
            self._queued.pop(rid).frames.fail(
                ErrorBody(ErrorCode.MOVED, f"{model} is going to sleep here", retry=True)
            )

    async def drain(self, instance: ModelInstance, drain_s: float) -> None:
        """Let running requests of a model finish; what is left after `drain_s` is replayed elsewhere."""
        self.send_away_queued(instance.name)
        deadline = time.monotonic() + drain_s
        while self.count(instance.name) and time.monotonic() < deadline:
            await self._wait_for_change(deadline - time.monotonic())
        for rid, running in list(self._running.items()):
            if running.instance is instance:
                running.frames.fail(
                    ErrorBody(ErrorCode.MOVED, f"{instance.name} is going to sleep here", retry=True)
                )
                self.cancel(rid)
        deadline = time.monotonic() + ABORT_REPEAT_S * ABORT_ATTEMPTS
        while self.count(instance.name) and time.monotonic() < deadline:
            await self._wait_for_change(deadline - time.monotonic())

    def engine_lost(self, instance: ModelInstance, how: str) -> None:
        """Tell the gateways of all requests that the engine had, and of those queued for it."""
        error = ErrorBody(ErrorCode.ENGINE_LOST, f"the engine of {instance.name} is gone: {how}", retry=True)
        lost = [rid for rid, running in self._running.items() if running.instance is instance]
        for rid in lost:
            self._forget_running(rid).frames.fail(error)
        self.send_away_queued(instance.name)
        if lost:
            self._note_change(instance)

    def reassure(self) -> None:
        """Send a frame for every request that is here: the bus was away, and frames may be lost. A gateway
        learns that its request is alive, or sees the gap."""
        for entry in [*self._queued.values(), *self._running.values()]:
            entry.frames.alive()

    def expire(self) -> None:
        """End what is past its deadline: whoever waited has stopped waiting."""
        now = time.monotonic()
        for rid, waiting in list(self._queued.items()):
            if waiting.expires < now:
                self._entries.remove(rid)
                del self._queued[rid]
                waiting.instance.record.never_began(waiting.objectives)
                waiting.frames.fail(ErrorBody(ErrorCode.DEADLINE_EXCEEDED, "not started before its deadline"))
                self._note_change(waiting.instance)
        for rid, running in list(self._running.items()):
            if running.expires < now and rid not in self._aborting:
                running.frames.fail(ErrorBody(ErrorCode.DEADLINE_EXCEEDED, "not finished by its deadline"))
                self.cancel(rid)
