"""A test double of the worker's side of the bus protocol.

It reports load, publishes routes, takes requests and cancellations, and answers each request with the
frames that a test's script sends. No engine is behind it: what a real worker generates is covered by the
end-to-end tests.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorBody, ErrorCode
from prism.common.messages.codec import decode, encode
from prism.common.messages.generation import (
    CancelRequest,
    Finish,
    GenerateRequest,
    TokenFrame,
    TokenLogprob,
)
from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelState
from prism.common.messages.placement import Route
from prism.common.tasks import end_task

REPORT_INTERVAL_S = 0.1


class Turn:
    """One request at the worker, and the means to answer it."""

    def __init__(self, bus: Bus, request: GenerateRequest, reply: str) -> None:
        self.request = request
        self.cancelled = asyncio.Event()
        self.sent: list[int] = []
        self._bus = bus
        self._reply = reply
        self._seq = 0

    async def send(
        self,
        tokens: Sequence[int] = (),
        *,
        finish: str | None = None,
        matched: int | None = None,
        logprobs: list[TokenLogprob] | None = None,
        cached: int = 0,
        skip: int = 0,
    ) -> None:
        """Send a frame; `skip` leaves out so many sequence numbers before it."""
        self.sent += tokens
        end = None
        if finish is not None:
            end = Finish(finish, len(self.request.input_ids), len(self.sent), cached, matched)
        self._seq += skip
        await self._frame(
            TokenFrame(self.request.rid, self._seq, list(tokens), logprobs=logprobs, finish=end)
        )

    async def fail(self, code: ErrorCode, message: str = "scripted", *, retry: bool = False) -> None:
        """Send an error."""
        await self._frame(TokenFrame(self.request.rid, self._seq, error=ErrorBody(code, message, retry)))

    async def _frame(self, frame: TokenFrame) -> None:
        self._seq += 1
        await self._bus.publish(self._reply, frame)


Script = Callable[[Turn], Awaitable[None]]


class ScriptedWorker:
    """Answers by `script`. `turns` and `cancels` hold what has come, in order."""

    def __init__(self, bus: Bus, name: str, script: Script) -> None:
        self.name = name
        self.script = script
        self.turns: asyncio.Queue[Turn] = asyncio.Queue()
        self.cancels: asyncio.Queue[str] = asyncio.Queue()
        self.loads: dict[str, ModelLoad] = {}
        self.silent = False
        self.draining = False
        self._bus = bus
        self._by_rid: dict[str, Turn] = {}
        self._listening: dict[str, Subscription] = {}

    def forget(self) -> None:
        """Drop what has come so far, for tests that send a lot."""
        self.turns = asyncio.Queue()
        self.cancels = asyncio.Queue()
        self._by_rid.clear()

    async def listen(self, model: str) -> None:
        """Take requests for `model`."""
        self._listening[model] = await self._bus.subscribe(
            subjects.request(model, self.name), self._on_request
        )
        await self._bus.flush()

    async def stop_listening(self, model: str) -> None:
        """Take none any more; the route stays."""
        await self._listening.pop(model).unsubscribe()
        await self._bus.flush()

    async def put_route(self, model: str) -> None:
        """Say that `model` is served here."""
        routes = await self._bus.bucket(subjects.BUCKET_ROUTES)
        await routes.put(subjects.route_key(model, self.name), encode(Route(model, self.name, "node")))

    async def delete_route(self, model: str) -> None:
        """Say that it no longer is."""
        routes = await self._bus.bucket(subjects.BUCKET_ROUTES)
        await routes.delete(subjects.route_key(model, self.name))

    async def serve(self, model: str) -> None:
        """Serve `model`: listen, then say so."""
        self.loads[model] = ModelLoad(model, ModelState.ACTIVE)
        await self.listen(model)
        await self.report()
        await self.put_route(model)

    async def report(self) -> None:
        """Send a load report now."""
        loads = list(self.loads.values())
        report = LoadReport(self.name, "node", "simulated", [0], 2**30, 0, loads, draining=self.draining)
        await self._bus.publish(subjects.load(self.name), report)

    async def run(self) -> None:
        """Report load until cancelled."""
        while True:
            if not self.silent:
                await self.report()
            await asyncio.sleep(REPORT_INTERVAL_S)

    async def on_cancel(self, message: Msg) -> None:
        """Note a cancellation."""
        rid = decode(message.data, CancelRequest).rid
        if rid in self._by_rid:
            self._by_rid[rid].cancelled.set()
        self.cancels.put_nowait(rid)

    async def _on_request(self, message: Msg) -> None:
        turn = Turn(self._bus, decode(message.data, GenerateRequest), message.reply)
        self._by_rid[turn.request.rid] = turn
        self.turns.put_nowait(turn)
        await self.script(turn)


@asynccontextmanager
async def scripted_worker(bus: Bus, name: str, script: Script) -> AsyncIterator[ScriptedWorker]:
    """A worker that reports load and serves nothing yet."""
    worker = ScriptedWorker(bus, name, script)
    cancels = await bus.subscribe(subjects.cancel(name), worker.on_cancel, inline=True)
    await bus.flush()
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        await end_task(task)
        await cancels.unsubscribe()


def saying(*frames: Sequence[int], finish: str = "stop") -> Script:
    """A script that sends these frames, the last one with the ending."""

    async def script(turn: Turn) -> None:
        for frame in frames[:-1]:
            await turn.send(frame)
        await turn.send(frames[-1], finish=finish)

    return script


async def hanging(turn: Turn) -> None:
    """A script that says nothing."""
