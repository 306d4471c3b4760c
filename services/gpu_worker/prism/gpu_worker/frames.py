"""Token frames on their way to gateways: numbered per request, published in order by one task."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats.errors

from prism.common.bus import Bus
from prism.common.errors import ErrorBody
from prism.common.messages.codec import encode
from prism.common.messages.generation import Finish, TokenFrame, TokenLogprob
from prism.common.tasks import end_task

log = logging.getLogger(__name__)


class FramePublisher:
    """Publishes frames without making the caller wait. Made by `frame_publisher`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._not_sent = 0

    def send(self, subject: str, frame: TokenFrame) -> None:
        """Queue a frame for `subject`."""
        self._queue.put_nowait((subject, encode(frame)))

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            subject, payload = await self._queue.get()
            try:
                await self._bus.client.publish(subject, payload)
            except (nats.errors.Error, OSError):
                # The gateway sees a gap in the sequence, or nothing, and replays.
                self._not_sent += 1
            else:
                if self._not_sent:
                    log.warning("%d frames were not sent while the bus was away", self._not_sent)
                    self._not_sent = 0
            finally:
                self._queue.task_done()

    async def drained(self) -> None:
        """Wait until all that was queued is published."""
        await self._queue.join()


class FrameStream:
    """The frames of one request: numbers them, and allows exactly one last one."""

    def __init__(self, publisher: FramePublisher, subject: str, rid: str) -> None:
        self._publisher = publisher
        self._subject = subject
        self._seq = 0
        self.rid = rid
        self.ended = False

    def tokens(self, tokens: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """Some tokens, more to follow."""
        self._send(TokenFrame(self.rid, self._seq, tokens, logprobs))

    def alive(self) -> None:
        """Nothing new: the request is here still, and this is how many frames there were."""
        self._send(TokenFrame(self.rid, self._seq))

    def finish(self, tokens: list[int], logprobs: list[TokenLogprob] | None, finish: Finish) -> None:
        """The last tokens."""
        self._send(TokenFrame(self.rid, self._seq, tokens, logprobs, finish), last=True)

    def fail(self, error: ErrorBody) -> None:
        """The end, for a reason."""
        self._send(TokenFrame(self.rid, self._seq, error=error), last=True)

    def _send(self, frame: TokenFrame, *, last: bool = False) -> None:
        if self.ended:
            return
        self.ended = last
        self._seq += 1
        self._publisher.send(self._subject, frame)


@asynccontextmanager
async def frame_publisher(bus: Bus) -> AsyncIterator[FramePublisher]:
    """A running publisher; what is queued at the end is still published."""
    publisher = FramePublisher(bus)
    task = asyncio.create_task(publisher.run(), name="frames")
    try:
        yield publisher
        async with asyncio.timeout(5.0):
            await publisher.drained()
    finally:
        await end_task(task)
