"""One engine host as its worker sees it: calls with deadlines, a stream of outputs, one end.

However an engine ends (asked to, killed, crashed), `ended` is set with the reason, every pending call
fails with engine_lost, and the process is gone for certain.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.gpu_worker.engine_protocol import (
    Abort,
    Arrived,
    Done,
    Doze,
    Dying,
    Failed,
    FromEngine,
    Generate,
    Imaged,
    MessageBuffer,
    Outputs,
    PrepareFreeze,
    Progress,
    QuotaSet,
    Ready,
    SetQuota,
    StartEngine,
    ToEngine,
    Wake,
    WeightsGranted,
    WeightsSized,
    pack,
    unpack_from_engine,
)
from prism.gpu_worker.shells import Shell

log = logging.getLogger(__name__)

Answer = Ready | Done | QuotaSet

RECEIVE_BYTES = 1 << 20
EXIT_DEADLINE_S = 5.0


class EngineEvents:
    """What an engine tells its worker without being asked; made by the model instance."""

    def __init__(
        self,
        *,
        on_outputs: Callable[[Outputs], None],
        on_weights_sized: Callable[[int], bool],
        on_progress: Callable[[Progress], None],
        on_imaged: Callable[[Imaged], None],
    ) -> None:
        self.on_outputs = on_outputs
        self.on_weights_sized = on_weights_sized
        self.on_progress = on_progress
        self.on_imaged = on_imaged


class EngineProcess:
    """A shell that becomes an engine by `start`. `close` ends it; `ended` says how it ended.

    `heard_at` is when it last said anything, in seconds on the monotonic clock.
    """

    def __init__(self, shell: Shell, events: EngineEvents) -> None:
        self.pid = shell.pid
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.heard_at = time.monotonic()
        self._shell = shell
        self._events = events
        self._buffer = MessageBuffer()
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._next_call = 0
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._reason = ""
        self._arrived: asyncio.Future[Arrived] | None = None

    async def open(self) -> None:
        """Begin to read what the engine says."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._shell.connection)
        self._reader_task = asyncio.create_task(self._read(reader), name=f"engine {self.pid}")

    async def start(self, build: Callable[[int], StartEngine], deadline_s: float) -> Ready:
        """Have the shell become an engine. Raises PrismError when it can't; it is gone then."""
        ready = await self._call(build, deadline_s)
        if not isinstance(ready, Ready):
            raise PrismError(ErrorCode.INTERNAL, f"engine {self.pid} answered a start with {ready}")
        return ready

    async def doze(self, deadline_s: float) -> Done:
        """Give back weights and KV memory. Raises PrismError; the engine is then as it was, or (without an
        answer in time) ended."""
        return await self._transition(Doze, deadline_s)

    async def wake(self, deadline_s: float) -> Done:
        """Take memory and weights again. Raises PrismError; the engine then dozes still, or (without an
        answer in time) ended. When weights are under way at its end, `weights_arrived` waits for them."""
        # Before it is asked: what it says twice may come at once.
        self._arrived = asyncio.get_running_loop().create_future()
        return await self._transition(Wake, deadline_s)

    async def weights_arrived(self, deadline_s: float) -> dict[str, float]:
        """Wait for the weights that were under way when a wake was done. Returns the seconds of each phase.
        Raises PrismError: the engine has ended, or ends."""
        assert self._arrived is not None
        try:
            async with asyncio.timeout(deadline_s):
                arrived = await asyncio.shield(self._arrived)
        except TimeoutError as error:
            raise self._give_up(f"had not all of its weights after {deadline_s:.1f} s") from error
        if arrived.error is not None:
            self.kill(arrived.error.message)
            raise PrismError.from_body(arrived.error)
        return arrived.seconds

    async def prepare_freeze(self, deadline_s: float) -> Done:
        """Have a dozing engine ready for its process to be frozen. Raises PrismError; the engine then dozes
        still, or (without an answer in time) ended."""
        return await self._transition(PrepareFreeze, deadline_s)

    async def _transition(
        self, kind: type[Doze] | type[Wake] | type[PrepareFreeze], deadline_s: float
    ) -> Done:
        done = await self._call(kind, deadline_s)
        if not isinstance(done, Done):
            raise PrismError(ErrorCode.INTERNAL, f"engine {self.pid} answered {kind.__name__} with {done}")
        if done.error is not None:
            raise PrismError.from_body(done.error)
        return done

    async def set_quota(self, kv_bytes: int, deadline_s: float) -> QuotaSet:
        """Bound the KV cache. Raises PrismError: the engine has ended, or (without an answer in
        time) ends."""
        answer = await self._call(lambda call: SetQuota(call, kv_bytes), deadline_s)
        if not isinstance(answer, QuotaSet):
            raise PrismError(ErrorCode.INTERNAL, f"engine {self.pid} answered a quota with {answer}")
        return answer

    def generate(self, request: Generate) -> None:
        """Queue a request in the engine. Its outputs come through `on_outputs`."""
        self._send(request)

    def abort(self, rid: str) -> None:
        """Ask the engine to stop `rid`; a final output follows if it was running."""
        self._send(Abort(rid))

    def when_gone(self, then: Callable[[], None]) -> None:
        """Have `then` called once its processes have ended for certain, and with them all that they held."""
        self._shell.gone.add_done_callback(lambda _: then())

    async def close(self) -> None:
        """End the engine: closing its socket asks for it, a signal enforces it. Returns when it is gone.

        Raises PrismError(internal, retry) when its process is there still, as one is that the kernel does not
        let go of."""
        if self._writer is not None:
            self._writer.close()
        try:
            async with asyncio.timeout(EXIT_DEADLINE_S):
                await asyncio.shield(self._shell.gone)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            try:
                async with asyncio.timeout(EXIT_DEADLINE_S):
                    await asyncio.shield(self._shell.gone)
            except TimeoutError as error:
                raise PrismError(
                    ErrorCode.INTERNAL,
                    f"engine {self.pid} is there still, {EXIT_DEADLINE_S:g} s after it was killed; until it "
                    "is gone its memory stays reserved and its model is not started again",
                    retry=True,
                ) from error
        if self._reader_task is not None:
            self._reader_task.cancel()
            await asyncio.gather(self._reader_task, return_exceptions=True)
        self._end(self._shell.exited.result())

    def kill(self, reason: str = "") -> None:
        """End the engine at once; `reason` is told with its end."""
        self._reason = self._reason or reason
        self._signal(signal.SIGKILL)

    def _signal(self, signum: signal.Signals) -> None:
        # The pid is ours until its exit was reported to us; after that it may be somebody else's.
        if not self._shell.exited.done():
            try:
                os.kill(self.pid, signum)
            except ProcessLookupError:
                log.debug("engine %d was gone already", self.pid)

    async def _call(self, build: Callable[[int], ToEngine], deadline_s: float) -> Answer:
        self._next_call += 1
        call = self._next_call
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[call] = answer
        try:
            self._send(build(call))
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError as error:
            raise self._give_up(f"did not answer within {deadline_s:.1f} s") from error
        finally:
            self._calls.pop(call, None)

    def _give_up(self, why: str) -> PrismError:
        # Whatever it is at, it can't be told to let go of it.
        self.kill(f"stuck: it {why}")
        return PrismError(ErrorCode.DEADLINE_EXCEEDED, f"engine {self.pid} {why}", retry=True)

    def _send(self, message: ToEngine) -> None:
        if self._writer is None or self.ended.done() or self._writer.is_closing():
            raise PrismError(ErrorCode.ENGINE_LOST, f"engine {self.pid} is gone", retry=True)
        self._writer.write(pack(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(RECEIVE_BYTES):
                self.heard_at = time.monotonic()
                for body in self._buffer.feed(data):
                    self._dispatch(unpack_from_engine(body))
        except OSError as error:
            log.debug("engine %d: %s", self.pid, error)
        except Exception:
            # Whatever it said can't be dealt with: an engine that nobody listens to must not seem alive.
            log.info("what engine %d said", self.pid, exc_info=True)
            self.kill("it said something that can't be dealt with")
        try:
            async with asyncio.timeout(EXIT_DEADLINE_S):
                how = await asyncio.shield(self._shell.exited)
        except TimeoutError:
            # It closed its socket and lives on: nobody can talk to it any more.
            self.kill()
            how = "closed its socket, was killed"
        self._end(how)

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                self._events.on_outputs(message)
            case Ready() | Done() | QuotaSet():
                answer = self._calls.get(message.call)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Arrived():
                if self._arrived is not None and not self._arrived.done():
                    self._arrived.set_result(message)
            case Failed():
                self._fail(self._calls.get(message.call), message.error)
            case Progress():
                self._events.on_progress(message)
            case WeightsSized():
                self._send(WeightsGranted(self._events.on_weights_sized(message.nbytes)))
            case Imaged():
                self._events.on_imaged(message)
            case Dying():
                self._reason = message.reason

    def _fail(self, answer: "asyncio.Future[Answer] | None", error: ErrorBody) -> None:
        if answer is not None and not answer.done():
            answer.set_exception(PrismError.from_body(error))

    def _end(self, how: str) -> None:
        if self.ended.done():
            return
        how = f"{self._reason} ({how})" if self._reason else how
        self.ended.set_result(how)
        lost = ErrorBody(ErrorCode.ENGINE_LOST, f"engine {self.pid}: {how}", retry=True)
        for answer in self._calls.values():
            self._fail(answer, lost)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(Arrived({}, lost))
