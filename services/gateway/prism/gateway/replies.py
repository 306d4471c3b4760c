"""One subscription for the frames of all requests of this gateway, handed out by request id."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode
from prism.common.messages.generation import TokenFrame
from prism.common.telemetry import about

log = logging.getLogger(__name__)

NO_RESPONDERS = "503"
# A try to connect takes 2 s at most, and the worker's may have begun a moment before the server was there.
RETURN_GRACE_S = 3.0


class Inbox:
    """What has come for one attempt: frames, or the news that none will come. One task reads it.

    A frame comes for every token of every stream, so nothing here is made anew for each: a timer that is set
    stays, and looks when it fires whether anyone waits beyond his time.
    """

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.received = 0
        self._frames: list[TokenFrame] = []
        self._error: PrismError | None = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[bool] | None = None
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: TokenFrame | PrismError) -> None:
        """Add a frame, or the error that ends the attempt."""
        self.received += 1
        if isinstance(item, TokenFrame):
            if self._error is None:
                self._frames.append(item)
        elif self._error is None:
            self._error = item
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(True)

    async def get(self, until: float) -> list[TokenFrame]:
        """All frames that are there, waited for until the loop's clock says `until`.

        Raises the PrismError that was put, after the frames before it; TimeoutError when nothing came.
        """
        if not self._frames and self._error is None and not await self._wait(until):
            raise TimeoutError
        if self._frames:
            frames, self._frames = self._frames, []
            return frames
        assert self._error is not None
        raise self._error

    async def _wait(self, until: float) -> bool:
        self._until = until
        if self._timer is None or self._timer.when() > until:
            self._set_timer()
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._waiter = waiter
        try:
            return await waiter
        finally:
            self._waiter = None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._until, self._time_passed)

    def _time_passed(self) -> None:
        self._timer = None
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._loop.time() < self._until:
            self._set_timer()
        else:
            waiter.set_result(False)

    def close(self) -> None:
        """Nobody reads it any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Replies:
    """The mux. `take` is the inline handler of the subscription `prism.v1.reply.<gateway>.>`."""

    def __init__(self) -> None:
        self._inboxes: dict[str, Inbox] = {}

    @contextmanager
    def open(self, rid: str, worker: str) -> Iterator[Inbox]:
        """Take the frames of `rid` until the block ends; later ones are dropped."""
        inbox = self._inboxes[rid] = Inbox(worker)
        try:
            yield inbox
        finally:
            del self._inboxes[rid]
            inbox.close()

    async def take(self, message: Msg) -> None:
        """Hand a message to the attempt that it is for."""
        rid = message.subject.rpartition(".")[2]
        if rid == subjects.FRAMES:
            self._take_frames(message.data)
            return
        inbox = self._inboxes.get(rid)
        if inbox is None:
            return
        if not message.data and (message.headers or {}).get("Status") == NO_RESPONDERS:
            inbox.put(PrismError(ErrorCode.MOVED, f"{inbox.worker} no longer listens", retry=True))
            return
        try:
            inbox.put(decode(message.data, TokenFrame))
        except PrismError as error:
            log.error(
                "unreadable frame: %s; is the worker of this version? The request is tried again",
                error.message,
                extra=about(rid=rid, worker=inbox.worker),
            )
            inbox.put(PrismError(ErrorCode.ENGINE_LOST, f"{inbox.worker}: {error.message}", retry=True))

    def _take_frames(self, payload: bytes) -> None:
        try:
            frames = decode(payload, list[TokenFrame])
        except PrismError as error:
            # Each request that it concerns sees a gap, or stalls, and is replayed.
            named = {rid: inbox.worker for rid, inbox in self._inboxes.items() if rid.encode() in payload}
            log.error(
                "unreadable frames: %s; is the worker of this version? Its requests are tried again",
                error.message,
                extra=about(rid=",".join(named), worker=",".join(sorted({*named.values()}))),
            )
            return
        inboxes = self._inboxes
        for frame in frames:
            inbox = inboxes.get(frame.rid)
            if inbox is not None:
                inbox.put(frame)

    def worker_lost(self, worker: str) -> None:
        """`worker` is gone: end all attempts on it."""
        for inbox in self._inboxes.values():
            if inbox.worker == worker:
                inbox.put(PrismError(ErrorCode.ENGINE_LOST, f"{worker} has gone silent", retry=True))

    def bus_returned(self) -> None:
        """The bus was away. Workers send a frame for each request that they have still; an attempt of which
        nothing comes within RETURN_GRACE_S lost its request or its last frame on the way, and ends."""
        seen = {rid: inbox.received for rid, inbox in self._inboxes.items()}
        asyncio.get_running_loop().call_later(RETURN_GRACE_S, self._end_unheard, seen)

    def _end_unheard(self, seen: dict[str, int]) -> None:
        for rid, received in seen.items():
            inbox = self._inboxes.get(rid)
            if inbox is not None and inbox.received == received:
                why = f"nothing came from {inbox.worker} after the bus was back"
                inbox.put(PrismError(ErrorCode.ENGINE_LOST, why, retry=True))
