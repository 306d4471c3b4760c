"""The requests on this worker, from the bus to an engine and back: one queue for all models.

Owns every request here; an engine only knows the ones released to it. Each request ends with exactly one
last frame.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.messages.generation import Finish, GenerateRequest
from prism.common.messages.models import ModelState
from prism.common.telemetry import about
from prism.gpu_worker.engine_protocol import Generate, Outputs, TokenOutput
from prism.gpu_worker.frames import FramePublisher, FrameStream
from prism.gpu_worker.model_instance import ModelInstance
from prism.scheduling.admission import (
    AdmissionPolicy,
    EngineCapacity,
    GpuWork,
    QueuedRequest,
)

log = logging.getLogger(__name__)

ABORT_REPEAT_S = 0.1
ABORT_ATTEMPTS = 50


class RunningRequest:
    """A request that an engine has."""

    def __init__(self, request: GenerateRequest, frames: FrameStream, instance: ModelInstance) -> None:
        self.request = request
        self.frames = frames
        self.instance = instance
        self.expires = time.monotonic() + request.deadline_s
        self.generated = 0
        self.released_at = 0.0


class GenerationRequests:
    """Queued and running requests. `pump` releases what admission selects."""

    def __init__(
        self,
        publisher: FramePublisher,
        admission: AdmissionPolicy,
        find: Callable[[str], ModelInstance | None],
        spawn: Callable[..., asyncio.Task[None]],
        max_running_requests: int,
    ) -> None:
        self._publisher = publisher
        self._admission = admission
        self._find = find
        self._spawn = spawn
        self._max_running_requests = max_running_requests
        self._queued: dict[str, RunningRequest] = {}
        self._entries: dict[str, QueuedRequest] = {}
        self._running: dict[str, RunningRequest] = {}
        self._aborting: set[str] = set()
        self._changed = asyncio.Event()

    def arrive(self, request: GenerateRequest, reply: str) -> None:
        """Take a request from the bus, or answer at once why not."""
        frames = FrameStream(self._publisher, reply, request.rid, request.gateway)
        instance = self._find(request.model)
        if instance is None or instance.state is not ModelState.ACTIVE:
            frames.fail(ErrorBody(ErrorCode.MOVED, f"{request.model} is not served here now", retry=True))
            return
        if request.rid in self._queued or request.rid in self._running:
            log.warning("a request arrived twice", extra=about(rid=request.rid, model=request.model))
            return
        now = time.monotonic()
        self._queued[request.rid] = RunningRequest(request, frames, instance)
        self._entries[request.rid] = QueuedRequest(
            rid=request.rid,
            model=request.model,
            arrival_s=now,
            prompt_tokens=len(request.input_ids),
            max_new_tokens=request.sampling.max_new_tokens,
            deadline_s=now + request.deadline_s,
            priority=request.priority,
            tenant=request.tenant,
        )
        # The gateway waits for tokens with patience only once it knows that the request is here.
        frames.alive()
        self.pump()

    def cancel(self, rid: str) -> None:
        """Forget a queued request, abort a running one; unknown ones are done already."""
        waiting = self._queued.pop(rid, None)
        if waiting is not None:
            self._entries.pop(rid)
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

    def pump(self) -> None:
        """Release every queued request that admission lets start now."""
        if not self._entries:
            return
        admitted = self._admission.select(
            list(self._entries.values()), self._capacities(), GpuWork(), time.monotonic()
        )
        for rid in admitted.rids:
            entry = self._queued.pop(rid)
            del self._entries[rid]
            self._running[rid] = entry
            entry.released_at = time.monotonic()
            request = entry.request
            assert entry.instance.engine is not None
            try:
                entry.instance.engine.generate(
                    Generate(rid, request.input_ids, request.sampling, request.top_logprobs, request.priority)
                )
            except PrismError as error:
                del self._running[rid]
                entry.frames.fail(error.body)

    def _capacities(self) -> dict[str, EngineCapacity]:
        models = {entry.model for entry in self._entries.values()}
        capacities = {}
        for model in models:
            instance = self._find(model)
            if instance is None or instance.ready is None:
                capacities[model] = EngineCapacity(0, 0, 0, False)
                continue
            mine = [running for running in self._running.values() if running.instance is instance]
            promised = sum(
                len(running.request.input_ids) + running.request.sampling.max_new_tokens for running in mine
            )
            capacities[model] = EngineCapacity(
                running=len(mine),
                max_running=self._max_running_requests,
                kv_free_tokens=instance.ready.kv_tokens - promised,
                accepting=instance.state is ModelState.ACTIVE,
            )
        return capacities

    def on_outputs(self, instance: ModelInstance, message: Outputs) -> None:
        """Tokens of an engine on to their gateways."""
        for output in message.outputs:
            running = self._running.get(output.rid)
            if running is None:
                continue
            running.generated += len(output.tokens)
            instance.generated_tokens += len(output.tokens)
            if output.finish:
                self._finish(running, output)
            else:
                running.frames.tokens(output.tokens, output.logprobs)
        if any(output.finish for output in message.outputs):
            self._note_change(instance)
            self.pump()

    def _finish(self, running: RunningRequest, output: TokenOutput) -> None:
        del self._running[output.rid]
        request = running.request
        running.instance.prompt_tokens += len(request.input_ids)
        if output.error is not None:
            running.frames.fail(output.error)
        elif output.finish == "abort":
            running.frames.fail(ErrorBody(ErrorCode.CANCELLED, "cancelled"))
        else:
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
        return self.queued(model) + sum(
            1 for running in self._running.values() if running.instance.name == model
        )

    def working_since(self, instance: ModelInstance) -> float | None:
        """Since when its engine has had the oldest of its requests, None when it has none."""
        mine = (running for running in self._running.values() if running.instance is instance)
        return min((running.released_at for running in mine), default=None)

    def queued(self, model: str) -> int:
        """Requests of `model` that no engine has yet."""
        return sum(1 for entry in self._entries.values() if entry.model == model)

    def send_away_queued(self, model: str) -> None:
        """Answer every queued request of `model` with moved: its gateway finds it another place."""
        for rid in [entry.rid for entry in self._entries.values() if entry.model == model]:
            del self._entries[rid]
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
            self._running.pop(rid).frames.fail(error)
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
                del self._entries[rid]
                del self._queued[rid]
                waiting.frames.fail(ErrorBody(ErrorCode.DEADLINE_EXCEEDED, "not started before its deadline"))
        for rid, running in list(self._running.items()):
            if running.expires < now and rid not in self._aborting:
                running.frames.fail(ErrorBody(ErrorCode.DEADLINE_EXCEEDED, "not finished by its deadline"))
                self.cancel(rid)
