"""One HTTP exchange of a generation endpoint: body in, answer or event stream out, an eye on the client.

Starlette notices a client that has left only at the next send. Here a listener waits for the disconnect
beside the work, so that a parked or queued request ends at once as well.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prism.common.errors import ErrorCode, PrismError
from prism.common.tasks import end_task
from prism.common.telemetry import about
from prism.gateway.errors_http import error_object, error_response, status_of
from prism.gateway.http_body import read_body
from prism.gateway.metrics import Metrics
from prism.gateway.plan import Choice, Plan, Planner
from prism.gateway.progress import ChoiceRunner
from prism.gateway.settings import Settings
from prism.gateway.text_assembler import Piece

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode

Planned = Callable[[bytes, Headers, Planner], Awaitable[Plan]]

CLIENT_LEFT = 499
REQUEST_ID = "x-request-id"
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Outcome:
    """What is known of one exchange by now: the id that its client sees, its model, its HTTP status."""

    def __init__(self) -> None:
        self.request = ""
        self.model: str | None = None
        self.status = 200

    @property
    def names(self) -> dict[str, dict[str, str]]:
        """For log lines about it."""
        return about(request=self.request, model=self.model or "")


class Exchanges:
    """The exchanges in progress: to be waited for, and to be ended when waiting is over."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[None], Outcome] = {}
        self._arriving = 0
        self._changed = asyncio.Event()

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A request's body is being read while the block runs; there is nothing to be ended yet."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1
            self._changed.set()

    @contextmanager
    def track(self, work: asyncio.Task[None], outcome: Outcome) -> Iterator[None]:
        """`work`, which comes to `outcome`, is in progress while the block runs."""
        self._running[work] = outcome
        try:
            yield
        finally:
            del self._running[work]
            self._changed.set()

    async def finished(self, timeout_s: float) -> int:
        """Wait until none is in progress, at most `timeout_s`; how many are left."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._running or self._arriving:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return len(self._running) + self._arriving
        return 0

    def end_all(self, waited_s: float) -> None:
        """End those in progress, `waited_s` after they were left to finish; their clients are told."""
        for work, outcome in self._running.items():
            log.warning(
                "request ended with this gateway, unfinished %.0f s after it was to end; its client may try "
                "again, --drain-s leaves more time",
                waited_s,
                extra=outcome.names,
            )
            work.cancel()


class GenerationEndpoint:
    """An ASGI application: one POST endpoint. `plan` reads a body, with what `planner` makes as a request
    comes; the rest is the same for all."""

    def __init__(
        self,
        name: str,
        plan: Planned,
        planner: Callable[[], Planner],
        runner: ChoiceRunner,
        metrics: Metrics,
        exchanges: Exchanges,
        settings: Settings,
    ) -> None:
        self._name = name
        self._plan = plan
        self._planner = planner
        self._runner = runner
        self._metrics = metrics
        self._exchanges = exchanges
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        sender = _Sender(scope, receive, send)
        self._metrics.request_began()
        outcome = Outcome()
        try:
            await self._answer(Request(scope, receive), sender, outcome)
        except ClientDisconnect:
            outcome.status = CLIENT_LEFT
        except PrismError as error:
            outcome.status = status_of(error)
            await sender.fail(error)
        except Exception as error:
            log.exception(
                "%s failed: a fault of the gateway, please report it", self._name, extra=outcome.names
            )
            outcome.status = 500
            await sender.fail(PrismError(ErrorCode.INTERNAL, f"internal error ({type(error).__name__})"))
        finally:
            self._metrics.request_ended(self._name, outcome.model, outcome.status)

    async def _answer(self, request: Request, sender: "_Sender", outcome: Outcome) -> None:
        planner = self._planner()
        with self._exchanges.arriving():
            body = await read_body(request, self._settings.max_body_bytes, self._settings.body_s)
        work = asyncio.create_task(self._work(body, request.headers, planner, sender, outcome))
        listener = asyncio.create_task(_disconnected(request.receive))
        try:
            with self._exchanges.track(work, outcome):
                await asyncio.wait({work, listener}, return_when=asyncio.FIRST_COMPLETED)
                left = listener.done() and not work.done()
                if left:
                    await end_task(work)
            if left:
                raise ClientDisconnect
            if work.cancelled():
                raise PrismError(ErrorCode.CANCELLED, "the gateway is shutting down; try again", retry=True)
            work.result()
        finally:
            await end_task(listener)
            await end_task(work)
            if not work.cancelled():
                work.exception()  # Seen: of no interest to a client that has left.

    async def _work(
        self, body: bytes, headers: Headers, planner: Planner, sender: "_Sender", outcome: Outcome
    ) -> None:
        plan = await self._plan(body, headers, planner)
        outcome.model = plan.model.spec.model_name
        outcome.request = sender.request_id = plan.request
        if plan.stream:
            await self._stream(plan, planner.arrived, sender)
        else:
            await self._runner.run(plan, planner.arrived, _NoStream())
            await sender.whole(plan.answer.whole(plan.choices))

    async def _stream(self, plan: Plan, arrived: float, sender: "_Sender") -> None:
        stream = _EventStream(plan, sender)
        await self._runner.run(plan, arrived, stream)
        await stream.close()


class _NoStream:
    """Where pieces go when the answer is told as a whole."""

    def take(self, index: int, choice: Choice, piece: Piece) -> None:
        return

    async def flush(self) -> None:
        return


class _EventStream:
    """Pieces as server-sent events: those taken between two flushes leave in one write. Where events repeat
    what was told, only a choice's last one of these does: for a client that is far behind, all would be the
    square of its answer."""

    def __init__(self, plan: Plan, sender: "_Sender") -> None:
        self._answer = plan.answer
        self._choices = plan.choices
        self._sender = sender
        self._opened = False
        self._waiting: list[bytes] = []
        self._repeated: dict[int, tuple[Choice, Piece]] = {}

    def take(self, index: int, choice: Choice, piece: Piece) -> None:
        if not self._opened:
            self._opened = True
            self._add(self._answer.opening(self._choices))
        if not self._answer.repeats:
            # Encoded now: what an event shows of its choice changes with the next piece.
            self._add(self._answer.events(index, choice, piece))
        elif piece.tokens or piece.ending is not None:
            self._repeated[index] = choice, piece

    def _add(self, events: Sequence[object]) -> None:
        for event in events:
            payload = event if isinstance(event, bytes) else _encode(event)
            self._waiting.append(b"data: %b\n\n" % payload)

    def _take_waiting(self) -> bytes:
        for index, (choice, piece) in self._repeated.items():
            self._add(self._answer.events(index, choice, piece))
        self._repeated.clear()
        data = b"".join(self._waiting)
        self._waiting.clear()
        return data

    async def flush(self) -> None:
        await self._sender.write(self._take_waiting(), more=True)

    async def close(self) -> None:
        """The end of a stream that has gone well."""
        told = self._take_waiting()
        self._add(self._answer.closing(self._choices))
        self._waiting.append(b"data: [DONE]\n\n")
        await self._sender.write(told + self._take_waiting(), more=False)


class _Sender:
    """Sends one answer. A stream begins with its first events: what goes wrong before has a status. Once
    there is a `request_id`, a header tells it: an answer that is an error has no other place for it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._lock = asyncio.Lock()
        self._whole = False
        self._head_sent = False
        self.started = False
        self.request_id = ""

    async def whole(self, content: object) -> None:
        await self._respond(Response(msgspec.json.encode(content), media_type="application/json"))

    async def fail(self, error: PrismError) -> None:
        """Tell of `error`: as the answer, or within the stream, which then ends without [DONE]."""
        if self._whole:
            return
        if self.started:
            await self.write(b"data: " + msgspec.json.encode(error_object(error)) + b"\n\n", more=False)
        else:
            await self._respond(error_response(error))

    async def _respond(self, response: Response) -> None:
        self._whole = True
        if self.request_id:
            response.headers[REQUEST_ID] = self.request_id
        await response(self._scope, self._receive, self._send)

    async def write(self, data: bytes, *, more: bool) -> None:
        """Send part of a stream (with no data: only begin it), waiting while the client is behind."""
        if not self._head_sent:
            async with self._lock:
                if not self._head_sent:
                    self.started = True
                    headers = [*EVENT_STREAM, (REQUEST_ID.encode(), self.request_id.encode())]
                    await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                    self._head_sent = True
        if data or not more:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
