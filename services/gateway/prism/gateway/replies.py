"""One subscription for the frames of all requests of this gateway, handed out by request id."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nats.aio.msg import Msg

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode
from prism.common.messages.generation import TokenFrame

log = logging.getLogger(__name__)

NO_RESPONDERS = "503"
RETURN_GRACE_S = 2.0


class Inbox:
    """What has come for one attempt: frames, or the news that none will come."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.received = 0
        self._queue: asyncio.Queue[TokenFrame | PrismError] = asyncio.Queue()

    def put(self, item: TokenFrame | PrismError) -> None:
        """Add a frame, or the error that ends the attempt."""
        self.received += 1
        self._queue.put_nowait(item)

    @property
    def empty(self) -> bool:
        """Whether `get` would have to wait."""
        return self._queue.empty()

    async def get(self) -> TokenFrame:
        """The next frame. Raises the PrismError that was put."""
        item = await self._queue.get()
        if isinstance(item, PrismError):
            raise item
        return item


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

    async def take(self, message: Msg) -> None:
        """Hand a message to the attempt that it is for."""
        inbox = self._inboxes.get(message.subject.rpartition(".")[2])
        if inbox is None:
            return
        if not message.data and (message.headers or {}).get("Status") == NO_RESPONDERS:
            inbox.put(PrismError(ErrorCode.MOVED, f"{inbox.worker} no longer listens", retry=True))
            return
        try:
            inbox.put(decode(message.data, TokenFrame))
        except PrismError as error:
            log.error("frame from %s: %s", inbox.worker, error.message)
            inbox.put(PrismError(ErrorCode.ENGINE_LOST, f"{inbox.worker}: {error.message}", retry=True))

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
