"""One model on this worker: its state, the transitions between states, and what each must leave behind.

A transition has one owner (the lock), a deadline and a rollback: memory is reserved in the ledger before
it is taken and given back only when the kernel says that it is free; a failed wake dozes on, a failed
start leaves no process.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from prism.common.errors import ErrorCode, PrismError, shortened
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.telemetry import about
from prism.gpu_worker.counted_memory import CountedMemory
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.engine_process import EngineEvents, EngineProcess
from prism.gpu_worker.engine_protocol import Done, Outputs, Progress, Ready, StartEngine
from prism.gpu_worker.image_export import ImageExport
from prism.gpu_worker.instance_memory import InstanceMemory, Room
from prism.gpu_worker.serving_record import ServingRecord
from prism.scheduling.ledger import MemoryLedger
from prism.scheduling.quotas import QuotaHolder

log = logging.getLogger(__name__)

STORE_DEADLINE_S = 600.0
SLOWEST_COPY_BYTES_PER_S = 500e6
ROLLED_BACK = (ErrorCode.STORE_UNAVAILABLE, ErrorCode.OUT_OF_MEMORY)
LOST = (ErrorCode.ENGINE_LOST, ErrorCode.DEADLINE_EXCEEDED)
IN_TRANSITION = (ModelState.STAGING, ModelState.STARTING, ModelState.WAKING)
"""On the way up: all memory is reserved, not all of it is taken."""
ASLEEP = (ModelState.DOZING, ModelState.FROZEN)
STARTABLE = (ModelState.COLD, ModelState.STAGED, ModelState.FAILED)


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
        room: Room,
        kv_tokens: Callable[[str], tuple[int, int]],
    ) -> None:
        self.spec = spec
        self.facts = facts
        self.state = ModelState.COLD
        self.state_since = time.monotonic()
        self.idle_since = time.monotonic()
        self.busy_since = 0.0
        # Infinity while weights are under way to an engine that has requests already.
        self.weights_arrived_at = 0.0
        self.failure: str | None = None
        self.engine: EngineProcess | None = None
        self.ready: Ready | None = None
        self.engine_load = Outputs([], 0, 0, 0)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.record = ServingRecord()
        self.lock = asyncio.Lock()
        self.memory = InstanceMemory(spec, facts, device, ledger, room)
        self.counted = CountedMemory(spec.model_name, device, self._alive)
        self._device = device
        self._store_socket = store_socket
        self._limits = limits
        self._on_state = on_state
        self._on_outputs = on_outputs
        self._on_engine_lost = on_engine_lost
        self._on_discarded = on_discarded
        self._on_progress = on_progress
        self._requests_kv_tokens = kv_tokens
        self._watch: asyncio.Task[None] | None = None
        self._lost: EngineProcess | None = None
        # One that was to end and has not yet: what it holds is reserved, nobody may start beside it.
        self._ending: EngineProcess | None = None
        self.image = ImageExport(spec.model_name)

    @property
    def most_kv_tokens(self) -> int | None:
        """Tokens that one request can have at most, with the largest quota; None while there is no engine."""
        return None if self.ready is None else self.memory.most_kv_tokens(self.ready)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.model_name

    @property
    def version(self) -> str:
        """The version that its engine was started for; empty while it has none."""
        return self.facts.version if self.engine is not None else ""

    def describe(self, spec: ModelSpec, facts: ModelFacts) -> None:
        """What the model is from its next engine on; while there is one it stays what it is."""
        if self.engine is None:
            self.spec, self.facts = spec, facts
            self.memory.describe(spec, facts)

    def set_state(self, state: ModelState, failure: str | None = None) -> None:
        """Enter `state`, and tell. A failed model stays failed until it is tried again, or released."""
        self.failure = failure = None if failure is None else shortened(failure)
        if state is self.state and failure is None:
            return
        self.state = state
        self.state_since = time.monotonic()
        self._on_state(self)

    async def activate(
        self, kv_bytes: int, deadline_s: float, on_serving: Callable[[], Awaitable[None]]
    ) -> dict[str, float]:
        """Serve: wake if dozing or frozen, else start an engine. Returns the seconds of each phase.

        `on_serving` is awaited as soon as requests may come, which may be before the last weights have. The
        caller holds the lock. Raises PrismError; the model is then dozing (a wake that rolled back),
        frozen (there was no room to thaw it), cold or failed, and holds no memory beyond that; or its engine
        ends, and requests that it has are lost with it.
        """
        began = time.perf_counter()
        if self.state is ModelState.ACTIVE:
            await on_serving()
            return {}
        if self.state in ASLEEP:
            seconds = await self._wake(kv_bytes, deadline_s, on_serving)
        elif self.state in STARTABLE:
            seconds = await self._start(kv_bytes, deadline_s)
            await self.serve(on_serving)
        else:
            raise PrismError(ErrorCode.INTERNAL, f"{self.name} is {self.state} already", retry=True)
        return {**seconds, "total": time.perf_counter() - began}

    async def serve(self, on_serving: Callable[[], Awaitable[None]], idle_since: float | None = None) -> None:
        """Be active from now on, with an engine that is ready to serve, idle since then or now, in seconds on
        the monotonic clock. The caller holds the lock."""
        self.idle_since = time.monotonic() if idle_since is None else idle_since
        self.set_state(ModelState.ACTIVE)
        await on_serving()

    async def _wake(
        self, kv_bytes: int, deadline_s: float, on_serving: Callable[[], Awaitable[None]]
    ) -> dict[str, float]:
        assert self.engine is not None
        kept = self.memory.kept_kv_bytes(kv_bytes)
        kv_bytes = await self.memory.reserve(self.memory.weights_bytes, kept)
        frozen = self.state is ModelState.FROZEN
        self.set_state(ModelState.WAKING)
        async with contextlib.AsyncExitStack() as turn:
            thawed, done = await self._woken(turn, frozen, kv_bytes, deadline_s)
            if done.under_way:
                arrived = await self._serve_while_weights_come(turn, on_serving)
                return {**thawed, **done.seconds, **arrived}
        await self.serve(on_serving)
        return {**thawed, **done.seconds}

    async def _woken(
        self, turn: contextlib.AsyncExitStack, frozen: bool, kv_bytes: int, deadline_s: float
    ) -> tuple[dict[str, float], Done]:
        assert self.engine is not None
        thawed: dict[str, float] = {}
        try:
            # Two wakes that copy at once would take twice as long each.
            await turn.enter_async_context(self._device.copying)
            if frozen:
                thawed = await self._device.freezer.thaw(self.engine.pid, deadline_s)
            if kv_bytes != self.memory.kv_bytes:
                await self._have_quota(kv_bytes)
            return thawed, await self.engine.wake(min(deadline_s, self._copy_deadline_s()))
        except BaseException as error:
            await turn.aclose()
            # An engine that could not copy rolled back by itself: it dozes on, with nothing mapped.
            rolled_back = isinstance(error, PrismError) and error.code in ROLLED_BACK
            if not (rolled_back and await self._dozes_on()):
                await self.discard_engine(*_after(error, "wake failed"))
            raise

    async def _dozes_on(self) -> bool:
        """Whether an engine that rolled its wake back holds no more than a dozing one does. It dozes then."""
        try:
            await self.counted.until_dozing()
        except PrismError as error:
            log.warning("%s", error.message, extra=about(model=self.name))
            return False
        except BaseException as error:
            await self.discard_engine(*_after(error, "wake failed"))
            raise
        self.memory.hold_fixed()
        self.set_state(ModelState.DOZING)
        return True

    async def _serve_while_weights_come(
        self, turn: contextlib.AsyncExitStack, on_serving: Callable[[], Awaitable[None]]
    ) -> dict[str, float]:
        assert self.engine is not None
        engine = self.engine
        self.weights_arrived_at = math.inf
        # In a task: it may take longer than the weights, and must not hide that they don't come.
        self.set_state(ModelState.ACTIVE)
        serving = asyncio.create_task(self.serve(on_serving), name=f"serve {self.name}")
        try:
            arrived = await engine.weights_arrived(self._copy_deadline_s())
        except BaseException as error:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            if isinstance(error, PrismError):
                # Here, not by the watch: whoever has the lock next must not find a model that seems active.
                self._tell_lost(engine, error.message)
                await self.discard_engine(ModelState.COLD)
            raise
        finally:
            self.weights_arrived_at = time.monotonic()
            await turn.aclose()
        await serving
        return arrived

    def quota_holder(self) -> QuotaHolder | None:
        """What the arbiter needs to know of it; None while its quota can't be changed."""
        return None if self.lock.locked() else self.kv_holder()

    def kv_holder(self) -> QuotaHolder | None:
        """Its KV cache and what it wants of it; None while it serves nobody."""
        if self.state is not ModelState.ACTIVE or self.ready is None:
            return None
        return self.memory.holder(self.ready, self.engine_load, *self._requests_kv_tokens(self.name))

    async def set_quota(self, kv_bytes: int) -> bool:
        """Have this KV quota, or what comes nearest to it. More is reserved before the engine has it, less is
        given back once it has confirmed. False when it can't be changed now. Raises PrismError."""
        async with self.lock:
            if self.state is not ModelState.ACTIVE:
                return False
            self.memory.raise_quota(kv_bytes)
            await self._have_quota(kv_bytes)
            return True

    async def _have_first_quota(self) -> None:
        try:
            await self._have_quota(self.memory.kv_bytes)
        except BaseException as error:
            await self.discard_engine(*_after(error))
            raise

    async def _have_quota(self, kv_bytes: int) -> None:
        assert self.engine is not None
        engine = self.engine
        answer = await engine.set_quota(kv_bytes, self._limits.stall_s)
        if self.engine is engine:
            self.memory.confirmed(answer)

    def _copy_deadline_s(self) -> float:
        return self._limits.stall_s + self.memory.weights_bytes / SLOWEST_COPY_BYTES_PER_S

    async def _start(self, kv_bytes: int, deadline_s: float) -> dict[str, float]:
        began = time.perf_counter()
        if self.spec.tp_size not in self._device.rank_counts:
            possible = ", ".join(map(str, self._device.rank_counts))
            raise PrismError(
                ErrorCode.UNSUPPORTED,
                f"{self.name} wants tp_size {self.spec.tp_size}; engines of the {self._device.name} device "
                f"of this worker have {possible} rank(s)",
            )
        await self._until_gone()
        self.image.begin()
        weights = self.memory.begin(kv_bytes)
        kv_bytes = await self.memory.reserve(weights, kv_bytes)
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
                ErrorCode.DEADLINE_EXCEEDED,
                f"{self.name}: no engine within {deadline_s:.0f} s, it was {self.state} by then; "
                "--activate-deadline-s of the global scheduler gives it longer",
                retry=True,
            )
            await self.discard_engine(*_after(late))
            raise late from error
        except BaseException as error:
            await self.discard_engine(*_after(error))
            raise
        self.memory.kv_tokens = self.ready.kv_tokens
        if self.ready.imaged:
            self.image.settled()
        if self.memory.kv_bytes < kv_bytes:
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
            weights_bytes=self.memory.reserved_weights_bytes,
            options=self._device.options,
            kv_cap_bytes=max(kv_bytes, self.memory.kv_cap_bytes) if self.spec.tp_size == 1 else 0,
            store_deadline_s=STORE_DEADLINE_S,
            version=self.facts.version,
        )

    def _events(self, kv_bytes: int) -> EngineEvents:
        def sized(nbytes: int) -> bool:
            if not self.memory.grant_weights(nbytes, kv_bytes):
                return False
            self.set_state(ModelState.STARTING)
            return True

        def outputs(message: Outputs) -> None:
            self.engine_load = message
            self._on_outputs(self, message)

        return EngineEvents(
            on_outputs=outputs,
            on_weights_sized=sized,
            on_progress=lambda progress: self._on_progress(self, progress),
            on_imaged=self.image.told,
        )

    async def doze(self, deadline_s: float) -> dict[str, float]:
        """Give back weights and KV memory, confirmed by the kernel. The caller holds the lock, and drained.

        Raises PrismError: the engine is gone then, and its memory free; or (store_unavailable) a rank of it
        has no image yet: the engine is as it was, and drained.
        """
        assert self.engine is not None
        began = time.perf_counter()
        try:
            done = await self.engine.doze(min(deadline_s, self._limits.stall_s))
        except BaseException as error:
            if not isinstance(error, PrismError) or error.code is not ErrorCode.STORE_UNAVAILABLE:
                await self.discard_engine(*_after(error, "doze failed"))
            raise
        try:
            given_back = time.perf_counter()
            await self.counted.until_dozing()
            self.memory.hold_fixed()
        except BaseException as error:
            await self.discard_engine(*_after(error, "doze failed"))
            raise
        self.engine_load = Outputs([], 0, 0, 0)
        self.set_state(ModelState.DOZING)
        ended = time.perf_counter()
        return {**done.seconds, "confirm": ended - given_back, "total": ended - began}

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
            await self.counted.until_frozen()
        except BaseException as error:
            await self.discard_engine(*_after(error, "freeze failed"))
            raise
        self.memory.hold_nothing()
        self.set_state(ModelState.FROZEN)
        return {**prepared.seconds, **frozen, "total": time.perf_counter() - began}

    async def thaw(self, deadline_s: float) -> dict[str, float]:
        """Have a frozen engine doze again. The caller holds the lock.

        Raises PrismError: the model is frozen still when there is no room for it, else its engine is gone.
        """
        assert self.engine is not None
        began = time.perf_counter()
        self.memory.hold_fixed()
        try:
            thawed = await self._device.freezer.thaw(self.engine.pid, deadline_s)
        except BaseException as error:
            await self.discard_engine(*_after(error, "thaw failed"))
            raise
        self.set_state(ModelState.DOZING)
        return {**thawed, "total": time.perf_counter() - began}

    def _alive(self) -> tuple[int, Ready] | None:
        if self.engine is None or self.ready is None or self.engine.ended.done():
            return None
        return self.engine.pid, self.ready

    async def _until_gone(self) -> None:
        """Wait for the engine that was to end, if there is one. Raises PrismError when it still has not."""
        ending = self._ending
        if ending is not None:
            await ending.close()
            self._let_go(ending)

    def _let_go(self, engine: EngineProcess) -> None:
        """Nothing is left of `engine`, which may have been said before."""
        if self._ending is engine:
            self._ending = None
            self.memory.release()

    async def discard_engine(self, state: ModelState, failure: str | None = None) -> None:
        """End the engine, if any; its memory is free when this returns, and the state is `state`.

        Raises PrismError when its process is there still: the model is failed then, its memory reserved for
        as long as that lasts."""
        engine, self.engine = self.engine, None
        self.ready = None
        self.engine_load = Outputs([], 0, 0, 0)
        watch, self._watch = self._watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if engine is not None:
            self._ending = engine
            engine.when_gone(partial(self._let_go, engine))
        try:
            await self._until_gone()
            self.memory.release()
        except PrismError as error:
            state, failure = ModelState.FAILED, error.message
            raise
        finally:
            self._on_discarded(self)
            self.set_state(state, failure)

    async def _watch_end(self, engine: EngineProcess) -> None:
        how = await engine.ended
        if self.ready is None:
            # A start that failed: whoever waits for it deals with it.
            return
        # At once: whoever holds the lock may be waiting for this engine's requests to finish.
        self._tell_lost(engine, how)
        async with self.lock:
            if self.engine is engine:
                try:
                    await self.discard_engine(ModelState.COLD)
                except PrismError as error:
                    log.error("%s", error.message, extra=about(model=self.name))

    def _tell_lost(self, engine: EngineProcess, how: str) -> None:
        if self._lost is not engine:
            self._lost = engine
            self.image.lost()
            self._on_engine_lost(self, how)


def _after(error: BaseException, what: str = "") -> tuple[ModelState, str | None]:
    """The state that a failed transition leaves, and the reason to keep: what may pass by itself leaves the
    model cold, to be tried again; anything else makes it failed."""
    if isinstance(error, asyncio.CancelledError):
        return ModelState.COLD, None
    message = error.message if isinstance(error, PrismError) else f"{type(error).__name__}: {error}"
    reason = f"{what}: {message}" if what else message
    passing = isinstance(error, PrismError) and error.retry
    return (ModelState.COLD if passing else ModelState.FAILED), reason
