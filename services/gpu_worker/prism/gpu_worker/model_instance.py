"""One model on this worker: its state, the transitions between states, and what each must leave behind.

A transition has one owner (the lock), a deadline and a rollback: memory is reserved in the ledger before
it is taken and given back only when the kernel says that it is free; a failed wake dozes on, a failed
start leaves no process.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.load import ModelLoad
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.telemetry import about
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.engine_process import EngineEvents, EngineProcess
from prism.gpu_worker.engine_protocol import Imaged, Outputs, Progress, Ready, StartEngine
from prism.gpu_worker.serving_record import ServingRecord
from prism.scheduling.ledger import MemoryLedger
from prism.scheduling.memory import kv_floor, kv_reservation, weights_bytes
from prism.scheduling.quotas import QuotaHolder

log = logging.getLogger(__name__)

STORE_DEADLINE_S = 600.0
IMAGE_DEADLINE_S = 20.0
SLOWEST_COPY_BYTES_PER_S = 500e6
ROLLED_BACK = (ErrorCode.STORE_UNAVAILABLE, ErrorCode.OUT_OF_MEMORY)
LOST = (ErrorCode.ENGINE_LOST, ErrorCode.DEADLINE_EXCEEDED)
FREED_DEADLINE_S = 2.0
FREED_POLL_S = 0.002
SPARE_TOKENS = 8
"""SGLang starts a request only where a few more tokens are free than it takes."""
STARTABLE = (ModelState.COLD, ModelState.STAGED, ModelState.FAILED)


Room = Callable[[str, int, int], AbstractAsyncContextManager[None]]
"""Keeps free, within its context, what others can give away of so many bytes more for a model: (model, bytes
without which nothing is gained, bytes wanted)."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine may take on at once, and how long it may say nothing while it has work: beyond
    `stall_s` seconds it counts as stuck."""

    max_running_requests: int
    chunked_prefill_tokens: int
    stall_s: float = 10.0


class ModelInstance:
    """State and engine of one model. Hooks tell the worker what happens; it owns requests and routes."""

    def __init__(
        self,
        spec: ModelSpec,
        facts: ModelFacts,
        *,
        device: Device,
        ledger: MemoryLedger,
        store_socket: str,
        limits: EngineLimits,
        on_state: Callable[["ModelInstance"], None],
        on_outputs: Callable[["ModelInstance", Outputs], None],
        on_engine_lost: Callable[["ModelInstance", str], None],
        on_discarded: Callable[["ModelInstance"], None],
        on_progress: Callable[["ModelInstance", Progress], None],
        room: "Room",
        kv_tokens: Callable[[str], tuple[int, int]],
    ) -> None:
        self.spec = spec
        self.facts = facts
        self.state = ModelState.COLD
        self.state_since = time.monotonic()
        self.idle_since = time.monotonic()
        self.failure: str | None = None
        self.engine: EngineProcess | None = None
        self.ready: Ready | None = None
        self.engine_load = Outputs([], 0, 0, 0)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.record = ServingRecord()
        self.lock = asyncio.Lock()
        self._weights_bytes = 0
        self._kv_bytes = 0
        self._first_kv_bytes = 0
        self._device = device
        self._ledger = ledger
        self._store_socket = store_socket
        self._limits = limits
        self._on_state = on_state
        self._on_outputs = on_outputs
        self._on_engine_lost = on_engine_lost
        self._on_discarded = on_discarded
        self._on_progress = on_progress
        self._room = room
        self._requests_kv_tokens = kv_tokens
        self._kv_tokens = 0
        self._watch: asyncio.Task[None] | None = None
        self._image_settled = asyncio.Event()
        self._image_error: str | None = None

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV quota has room for now."""
        return self._kv_tokens

    @property
    def most_kv_bytes(self) -> int:
        """The largest quota that there may ever be here."""
        return max(self.kv_cap_bytes, self._ledger.held(self.name).kv)

    @property
    def most_kv_tokens(self) -> int | None:
        """Tokens that one request can have at most, with the largest quota; None while there is no engine."""
        if self.ready is None or not self.ready.kv_bytes_per_token:
            return None
        quota = self.most_kv_bytes - self.ready.kv_overhead_bytes
        return max(self._kv_tokens, quota // self.ready.kv_bytes_per_token) - SPARE_TOKENS

    @property
    def kv_cap_bytes(self) -> int:
        """The largest quota that it may get: what its operator allows, else all that its worker has beside
        its weights. The first one stays where an engine has several ranks: their pools can't be resized
        together yet."""
        if self.spec.tp_size > 1:
            return self._first_kv_bytes
        pool = self.spec.init_placements[0].max_memory_pool_size if self.spec.init_placements else None
        if pool is not None:
            return kv_reservation(self.spec, self.facts, self._device.element_bytes)
        held = self._ledger.held(self.name)
        return self._ledger.limit_bytes - held.weights - held.fixed

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.model_name

    def set_state(self, state: ModelState, failure: str | None = None) -> None:
        """Enter `state`, and tell. A failed model stays failed until it is tried again, or released."""
        self.failure = failure
        if state is self.state and failure is None:
            return
        self.state = state
        self.state_since = time.monotonic()
        self._on_state(self)

    async def activate(self, kv_bytes: int, deadline_s: float) -> dict[str, float]:
        """Serve: wake if dozing or frozen, else start an engine. Returns the seconds of each phase.

        The caller holds the lock. Raises PrismError; the model is then dozing (a wake that rolled back),
        frozen (there was no room to thaw it), cold or failed, and holds no memory beyond that.
        """
        began = time.perf_counter()
        if self.state is ModelState.ACTIVE:
            return {}
        if self.state in (ModelState.DOZING, ModelState.FROZEN):
            seconds = await self._wake(kv_bytes, deadline_s)
        elif self.state in STARTABLE:
            self._first_kv_bytes = kv_bytes
            seconds = await self._start(kv_bytes, deadline_s)
        else:
            raise PrismError(ErrorCode.INTERNAL, f"{self.name} is {self.state} already", retry=True)
        self.idle_since = time.monotonic()
        self.set_state(ModelState.ACTIVE)
        return {**seconds, "total": time.perf_counter() - began}

    async def _wake(self, kv_bytes: int, deadline_s: float) -> dict[str, float]:
        """With the quota that it had, or less where less is given to it now and quotas can change."""
        assert self.engine is not None
        kept = min(self._kv_bytes, kv_bytes) if self.spec.tp_size == 1 else self._kv_bytes
        kv_bytes = await self._reserve(self._weights_bytes, kept)
        frozen = self.state is ModelState.FROZEN
        self.set_state(ModelState.WAKING)
        thawed: dict[str, float] = {}
        try:
            async with self._device.copying:
                if frozen:
                    thawed = await self._device.freezer.thaw(self.engine.pid, deadline_s)
                if kv_bytes != self._kv_bytes:
                    await self._have_quota(kv_bytes)
                done = await self.engine.wake(min(deadline_s, self._copy_deadline_s()))
        except BaseException as error:
            # An engine that could not copy rolled back by itself: it dozes on, with nothing mapped.
            rolled_back = isinstance(error, PrismError) and error.code in ROLLED_BACK
            if rolled_back and not self._left_bytes():
                self._hold_fixed()
                self.set_state(ModelState.DOZING)
            else:
                await self.discard_engine(*_after(error, "wake failed"))
            raise
        return {**thawed, **done.seconds}

    async def _reserve(self, weights: int, kv_bytes: int) -> int:
        """Reserve what serving takes, for which others make room. Returns the KV quota: as much of `kv_bytes`
        as there is, its floor at least. Raises PrismError(out_of_memory)."""
        fixed = self._device.fixed_bytes
        floor = self._kv_at_least(weights, kv_bytes)
        held = self._ledger.held(self.name).total
        least = weights + fixed + floor - held
        async with self._room(self.name, least, weights + fixed + kv_bytes - held):
            beside = self._ledger.free_bytes + held - weights - fixed
            kv_bytes = min(kv_bytes, max(floor, beside))
            self._ledger.resize(self.name, weights=weights, kv=kv_bytes, fixed=fixed)
        return kv_bytes

    def _kv_at_least(self, weights: int, kv_bytes: int) -> int:
        """The quota without which it does not start: the floor that placement counts with, less what weights
        take beyond the estimate that placement counts with, up to half of it."""
        if self.spec.tp_size > 1:
            return kv_bytes
        floor = min(kv_bytes, self._kv_floor)
        beyond = weights - weights_bytes(self.facts, self._device.element_bytes)
        return floor - min(floor // 2, max(0, beyond))

    @property
    def _kv_floor(self) -> int:
        return kv_floor(self.spec, self.facts, self._device.element_bytes)

    def quota_holder(self) -> QuotaHolder | None:
        """What the arbiter needs to know of it; None while its quota can't be changed."""
        return None if self.lock.locked() else self._holder()

    def _holder(self) -> QuotaHolder | None:
        if self.state is not ModelState.ACTIVE or self.ready is None or self.spec.tp_size > 1:
            return None
        running, wanted = self._requests_kv_tokens(self.name)
        quota = self._ledger.held(self.name).kv
        return QuotaHolder(
            self.name,
            quota,
            used_bytes=self._kv_bytes_for(self.engine_load.kv_used_tokens),
            cached_bytes=self.engine_load.kv_cached_tokens * self.ready.kv_bytes_per_token,
            committed_bytes=self._kv_bytes_for(running),
            wanted_bytes=self._kv_bytes_for(wanted),
            floor_bytes=min(quota, self._kv_floor),
            cap_bytes=max(self.kv_cap_bytes, 0),
            granularity=self.ready.kv_page_bytes,
            priority=self.spec.priority,
        )

    def _kv_bytes_for(self, tokens: int) -> int:
        if self.ready is None or not tokens:
            return 0
        return self.ready.kv_overhead_bytes + (tokens + SPARE_TOKENS) * self.ready.kv_bytes_per_token

    async def set_quota(self, kv_bytes: int) -> bool:
        """Have this KV quota, or what comes nearest to it. More is reserved before the engine has it, less is
        given back once it has confirmed. False when it can't be changed now. Raises PrismError."""
        async with self.lock:
            if self.state is not ModelState.ACTIVE:
                return False
            held = self._ledger.held(self.name)
            if kv_bytes > held.kv:
                self._ledger.resize(self.name, weights=held.weights, kv=kv_bytes, fixed=held.fixed)
            await self._have_quota(kv_bytes)
            return True

    async def _have_first_quota(self) -> None:
        try:
            await self._have_quota(self._kv_bytes)
        except BaseException as error:
            await self.discard_engine(*_after(error))
            raise

    async def _have_quota(self, kv_bytes: int) -> None:
        assert self.engine is not None
        engine = self.engine
        answer = await engine.set_quota(kv_bytes, self._limits.stall_s)
        if self.engine is not engine:
            return
        if answer.retracted:
            log.info(
                "%d requests wait for memory: its KV quota is %.1f MB now",
                answer.retracted,
                answer.kv_bytes / 1e6,
                extra=about(model=self.name),
            )
        held = self._ledger.held(self.name)
        self._ledger.resize(
            self.name, weights=held.weights, kv=min(held.kv, answer.kv_bytes), fixed=held.fixed
        )
        self._kv_bytes, self._kv_tokens = answer.kv_bytes, answer.kv_tokens

    def _copy_deadline_s(self) -> float:
        return self._limits.stall_s + self._weights_bytes / SLOWEST_COPY_BYTES_PER_S

    async def _start(self, kv_bytes: int, deadline_s: float) -> dict[str, float]:
        began = time.perf_counter()
        if self.spec.tp_size not in self._device.rank_counts:
            possible = ", ".join(map(str, self._device.rank_counts))
            raise PrismError(
                ErrorCode.UNSUPPORTED,
                f"{self.name} wants tp_size {self.spec.tp_size}; engines of the {self._device.name} device "
                f"of this worker have {possible} rank(s)",
            )
        self._image_settled.clear()
        self._image_error = None
        weights = weights_bytes(self.facts, self._device.element_bytes, self.spec.tp_size)
        kv_bytes = await self._reserve(weights, kv_bytes)
        self.set_state(ModelState.STAGING)
        try:
            async with asyncio.timeout(deadline_s):
                shell = await self._device.shells.take()
                shelled = time.perf_counter()
                self.engine = EngineProcess(shell, self._events(kv_bytes))
                await self.engine.open()
                self._watch = asyncio.create_task(self._watch_end(self.engine), name=f"watch {self.name}")
                self.ready = await self.engine.start(
                    lambda call: self._start_message(call, kv_bytes), deadline_s
                )
        except TimeoutError as error:
            late = PrismError(
                ErrorCode.DEADLINE_EXCEEDED, f"{self.name}: no engine within {deadline_s:.0f} s", retry=True
            )
            await self.discard_engine(*_after(late))
            raise late from error
        except BaseException as error:
            await self.discard_engine(*_after(error))
            raise
        self._kv_tokens = self.ready.kv_tokens
        if self.ready.imaged:
            self._image_settled.set()
        if self._kv_bytes < kv_bytes:
            # Its weights turned out to be larger; the engine was told its quota before it knew.
            await self._have_first_quota()
        return {**self.ready.seconds, "shell": shelled - began}

    def _start_message(self, call: int, kv_bytes: int) -> StartEngine:
        return StartEngine(
            call=call,
            model=self.name,
            model_path=self.spec.model_path,
            store_socket=self._store_socket,
            layout=self._device.layout(0, self.spec.tp_size),
            rank_layouts=[self._device.layout(rank, self.spec.tp_size) for rank in range(self.spec.tp_size)],
            dtype=self._device.dtype,
            kv_bytes=kv_bytes,
            max_running_requests=self._limits.max_running_requests,
            chunked_prefill_tokens=self._limits.chunked_prefill_tokens,
            copy_threads=self._device.copy_threads,
            weights_bytes=self._ledger.held(self.name).weights,
            options=self._device.options,
            kv_cap_bytes=max(kv_bytes, self.kv_cap_bytes) if self.spec.tp_size == 1 else 0,
            store_deadline_s=STORE_DEADLINE_S,
        )

    def _events(self, kv_bytes: int) -> EngineEvents:
        def sized(nbytes: int) -> bool:
            fixed = self._device.fixed_bytes
            beside = self._ledger.free_bytes + self._ledger.held(self.name).total - nbytes - fixed
            kept = min(kv_bytes, max(beside, self._kv_at_least(nbytes, kv_bytes)))
            try:
                self._ledger.resize(self.name, weights=nbytes, kv=kept, fixed=fixed)
            except PrismError as error:
                log.info("its weights do not fit: %s", error.message, extra=about(model=self.name))
                return False
            self._weights_bytes, self._kv_bytes = nbytes, kept
            self.set_state(ModelState.STARTING)
            return True

        def outputs(message: Outputs) -> None:
            self.engine_load = message
            self._on_outputs(self, message)

        def imaged(message: Imaged) -> None:
            self._image_settled.set()
            if message.error is not None:
                self._image_error = message.error.message
                log.warning(
                    "no image for waking, it will start anew instead of dozing: %s",
                    message.error.message,
                    extra=about(model=self.name),
                )
            else:
                log.info("image exported in %.2f s", message.seconds, extra=about(model=self.name))

        return EngineEvents(
            on_outputs=outputs,
            on_weights_sized=sized,
            on_progress=lambda progress: self._on_progress(self, progress),
            on_imaged=imaged,
        )

    async def can_doze(self) -> bool:
        """Whether there is an image to wake from; waits for one that is on its way.

        Raises PrismError(store_unavailable, retry) when that takes longer than IMAGE_DEADLINE_S.
        """
        try:
            async with asyncio.timeout(IMAGE_DEADLINE_S):
                await self._image_settled.wait()
        except TimeoutError as error:
            raise PrismError(
                ErrorCode.STORE_UNAVAILABLE, f"the image of {self.name} is still being exported", retry=True
            ) from error
        return self._image_error is None

    async def doze(self, deadline_s: float) -> dict[str, float]:
        """Give back weights and KV memory, confirmed by the kernel. The caller holds the lock, and drained.

        Raises PrismError: the engine is gone then, and its memory free.
        """
        assert self.engine is not None
        began = time.perf_counter()
        try:
            done = await self.engine.doze(min(deadline_s, self._limits.stall_s))
            await self._confirm_freed()
        except BaseException as error:
            await self.discard_engine(*_after(error, "doze failed"))
            raise
        self.engine_load = Outputs([], 0, 0, 0)
        self.set_state(ModelState.DOZING)
        return {**done.seconds, "total": time.perf_counter() - began}

    async def freeze(self, deadline_s: float) -> dict[str, float]:
        """Take all device memory from a dozing engine, confirmed by the kernel. The caller holds the lock.

        Raises PrismError: the model dozes on, or (when the process can't go on) its engine is gone.
        """
        assert self.engine is not None
        if self.ready is not None and self.ready.ranks:
            raise PrismError(
                ErrorCode.UNSUPPORTED, f"{self.name} has several ranks; only engines of one can be frozen"
            )
        began = time.perf_counter()
        try:
            prepared = await self.engine.prepare_freeze(min(deadline_s, self._copy_deadline_s()))
            frozen = await self._device.freezer.freeze(self.engine.pid, deadline_s)
        except BaseException as error:
            if not isinstance(error, PrismError) or error.code in LOST:
                await self.discard_engine(*_after(error, "freeze failed"))
            raise
        try:
            await self._confirm_gone(self._held_bytes)
        except BaseException as error:
            await self.discard_engine(*_after(error, "freeze failed"))
            raise
        self._ledger.resize(self.name)
        self.set_state(ModelState.FROZEN)
        return {**prepared.seconds, **frozen, "total": time.perf_counter() - began}

    async def thaw(self, deadline_s: float) -> dict[str, float]:
        """Have a frozen engine doze again. The caller holds the lock.

        Raises PrismError: the model is frozen still when there is no room for it, else its engine is gone.
        """
        assert self.engine is not None
        began = time.perf_counter()
        self._hold_fixed()
        try:
            thawed = await self._device.freezer.thaw(self.engine.pid, deadline_s)
        except BaseException as error:
            await self.discard_engine(*_after(error, "thaw failed"))
            raise
        self.set_state(ModelState.DOZING)
        return {**thawed, "total": time.perf_counter() - began}

    async def _confirm_freed(self) -> None:
        await self._confirm_gone(self._left_bytes)
        self._hold_fixed()

    async def _confirm_gone(self, held: Callable[[], int]) -> None:
        # A driver may take a moment to count.
        deadline = time.monotonic() + FREED_DEADLINE_S
        while (left := held()) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(FREED_POLL_S)
        if left:
            raise PrismError(
                ErrorCode.INTERNAL, f"{self.name}: {left} bytes are still mapped after the engine freed them"
            )

    def _hold_fixed(self) -> None:
        """A dozing engine keeps what its process costs, and nothing else."""
        self._ledger.resize(self.name, fixed=self._device.fixed_bytes)

    def _held_bytes(self) -> int:
        if self.engine is None or self.ready is None or self.engine.ended.done():
            return 0
        return self._device.held_bytes(self.engine.pid, self.ready)

    def _left_bytes(self) -> int:
        if self.engine is None or self.ready is None or self.engine.ended.done():
            return 0
        return self._device.left_bytes(self.engine.pid, self.ready)

    async def discard_engine(self, state: ModelState, failure: str | None = None) -> None:
        """End the engine, if any; its memory is free when this returns, and the state is `state`."""
        engine, self.engine = self.engine, None
        self.ready = None
        self.engine_load = Outputs([], 0, 0, 0)
        watch, self._watch = self._watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        try:
            if engine is not None:
                await engine.close()
        finally:
            self._ledger.release(self.name)
            self._on_discarded(self)
        self.set_state(state, failure)

    async def _watch_end(self, engine: EngineProcess) -> None:
        how = await engine.ended
        if self.ready is None:
            # A start that failed: whoever waits for it deals with it.
            return
        # At once: whoever holds the lock may be waiting for this engine's requests to finish.
        self._on_engine_lost(self, how)
        async with self.lock:
            if self.engine is engine:
                await self.discard_engine(ModelState.COLD)

    def resident_bytes(self) -> tuple[int, int]:
        """Memory that stands behind weights and KV cache now, as the kernel counts it."""
        if self.engine is None or self.ready is None or self.engine.ended.done():
            return 0, 0
        return self._device.resident_bytes(self.engine.pid, self.ready)

    def load(self, queued: int) -> ModelLoad:
        """What there is to report of this model now; bytes are what the kernel says is there."""
        weights, kv = self.resident_bytes()
        running = self.engine_load.running + self.engine_load.waiting
        busy = queued + running > 0
        now = time.monotonic()
        holder = self._holder()
        prefill = self.record.prefill
        return ModelLoad(
            model=self.name,
            state=self.state,
            queued=queued,
            running=running,
            weights_bytes=weights,
            kv_quota_bytes=self._ledger.held(self.name).kv,
            kv_used_bytes=kv,
            kv_spare_bytes=holder.spare_bytes if holder is not None else 0,
            kv_wanted_bytes=self._kv_bytes_for(self._requests_kv_tokens(self.name)[1]),
            idle_s=0.0 if busy else now - self.idle_since,
            state_s=now - self.state_since,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            failure=self.failure,
            engine_steps=self.engine_load.steps,
            queue_s=self.record.queue_s,
            prefill_tokens_per_s=prefill.reached_tokens_per_s if prefill.known else None,
            decode_step_s=self.record.step.seconds,
            requests=self.record.requests,
            ttft_met=self.record.ttft_met,
            ttft_missed=self.record.ttft_missed,
            tpot_met=self.record.tpot_met,
            tpot_missed=self.record.tpot_missed,
        )


def _after(error: BaseException, what: str = "") -> tuple[ModelState, str | None]:
    """The state that a failed transition leaves, and the reason to keep: what may pass by itself leaves the
    model cold, to be tried again; anything else makes it failed."""
    if isinstance(error, asyncio.CancelledError):
        return ModelState.COLD, None
    message = error.message if isinstance(error, PrismError) else f"{type(error).__name__}: {error}"
    reason = f"{what}: {message}" if what else message
    passing = isinstance(error, PrismError) and error.retry
    return (ModelState.COLD if passing else ModelState.FAILED), reason
