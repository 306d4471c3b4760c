"""Token frames on their way to gateways: numbered per request, published in order by one task.

What a bus message costs is paid once a message, so frames that wait for the same gateway at the same moment,
as those of one engine step do, travel together. That delays nothing: a message takes what is there.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import nats.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorBody
from prism.common.messages.codec import encode
from prism.common.messages.generation import Finish, TokenFrame, TokenLogprob
from prism.common.tasks import end_task

log = logging.getLogger(__name__)

MOST_FRAMES = 64
LARGEST_MESSAGE_BYTES = 128 * 1024
"""Frames beyond these go into another message, well below what any server refuses."""

WaitingFrame = tuple[str, str, TokenFrame]
"""A frame, the subject of its request, and its gateway if it may travel with others."""


class FramePublisher:
    """Publishes frames without making the caller wait. Made by `frame_publisher`.

    Streams collect tokens for `coalesce_s` seconds into one frame; 0: each output is a frame at once.
    """

    def __init__(self, bus: Bus, coalesce_s: float = 0.0) -> None:
        self.coalesce_s = coalesce_s
        self._bus = bus
        self._waiting: list[WaitingFrame] = []
        self._something = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._holding: dict[FrameStream, None] = {}
        self._not_sent = 0

    def send(self, subject: str, gateway: str, frame: TokenFrame) -> None:
        """Queue a frame for `subject`; one of a known `gateway` may travel with others to it."""
        if not self._waiting:
            self._idle.clear()
            self._something.set()
        self._waiting.append((subject, gateway, frame))

    def hold(self, stream: "FrameStream") -> None:
        """Have `stream` release what it holds back, `coalesce_s` after the first that does."""
        if not self._holding:
            asyncio.get_running_loop().call_later(self.coalesce_s, self._release)
        self._holding[stream] = None

    def _release(self) -> None:
        holding, self._holding = self._holding, {}
        for stream in holding:
            stream.release()

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            await self._something.wait()
            self._something.clear()
            waiting, self._waiting = self._waiting, []
            for subject, payload, count in _messages(waiting):
                await self._publish(subject, payload, count)
            if not self._waiting:
                self._idle.set()

    async def _publish(self, subject: str, payload: bytes, count: int) -> None:
        try:
            await self._bus.client.publish(subject, payload)
        except (nats.errors.Error, OSError):
            # The gateway sees a gap in the sequence, or nothing, and replays.
            self._not_sent += count
        else:
            if self._not_sent:
                log.warning("%d frames were not sent while the bus was away", self._not_sent)
                self._not_sent = 0

    async def drained(self) -> None:
        """Wait until all that was queued is published."""
        self._release()
        await self._idle.wait()


def _messages(waiting: Sequence[WaitingFrame]) -> Iterator[tuple[str, bytes, int]]:
    """Subject, payload and number of frames of each message; frames of one request stay in order."""
    together: dict[str, list[tuple[str, TokenFrame]]] = {}
    for subject, gateway, frame in waiting:
        if gateway:
            together.setdefault(gateway, []).append((subject, frame))
        else:
            yield subject, encode(frame), 1
    for gateway, frames in together.items():
        for first in range(0, len(frames), MOST_FRAMES):
            yield from _joined(gateway, frames[first : first + MOST_FRAMES])


def _joined(gateway: str, frames: list[tuple[str, TokenFrame]]) -> Iterator[tuple[str, bytes, int]]:
    if len(frames) == 1:
        subject, frame = frames[0]
        yield subject, encode(frame), 1
        return
    payload = encode([frame for _, frame in frames])
    if len(payload) <= LARGEST_MESSAGE_BYTES:
        yield subjects.reply_frames(gateway), payload, len(frames)
    else:
        half = len(frames) // 2
        yield from _joined(gateway, frames[:half])
        yield from _joined(gateway, frames[half:])


class FrameStream:
    """The frames of one request: numbers them, and allows exactly one last one.

    They go to `subject`, or together with others to their `gateway` where that is known.
    """

    def __init__(self, publisher: FramePublisher, subject: str, rid: str, gateway: str = "") -> None:
        self._publisher = publisher
        self._subject = subject
        self._gateway = gateway if subject == subjects.reply(gateway, rid) else ""
        self._seq = 0
        self._begun = False
        self._held: list[int] = []
        self._held_logprobs: list[TokenLogprob] | None = None
        self.rid = rid
        self.ended = False

    def tokens(self, tokens: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """Some tokens, more to follow. The first ones never wait for others."""
        if not self._publisher.coalesce_s or not self._begun:
            self._begun = True
            self._send(TokenFrame(self.rid, self._seq, tokens, logprobs))
        elif not self.ended:
            self._held += tokens
            if logprobs is not None:
                self._held_logprobs = (self._held_logprobs or []) + logprobs
            self._publisher.hold(self)

    def release(self) -> None:
        """Send what was held back."""
        if self._held:
            tokens, logprobs = self._take_held()
            self._send(TokenFrame(self.rid, self._seq, tokens, logprobs))

    def _take_held(self) -> tuple[list[int], list[TokenLogprob] | None]:
        held, self._held = self._held, []
        logprobs, self._held_logprobs = self._held_logprobs, None
        return held, logprobs

    def alive(self) -> None:
        """Nothing new: the request is here still, and this is how many frames there were."""
        self.release()
        self._send(TokenFrame(self.rid, self._seq))

    def finish(self, tokens: list[int], logprobs: list[TokenLogprob] | None, finish: Finish) -> None:
        """The last tokens."""
        held, held_logprobs = self._take_held()
        if held_logprobs is not None:
            logprobs = held_logprobs + (logprobs or [])
        self._send(TokenFrame(self.rid, self._seq, held + tokens, logprobs, finish), last=True)

    def fail(self, error: ErrorBody) -> None:
        """The end, for a reason."""
        self.release()
        self._send(TokenFrame(self.rid, self._seq, error=error), last=True)

    def _send(self, frame: TokenFrame, *, last: bool = False) -> None:
        if self.ended:
            return
        self.ended = last
        self._seq += 1
        self._publisher.send(self._subject, self._gateway, frame)


@asynccontextmanager
async def frame_publisher(bus: Bus, coalesce_s: float = 0.0) -> AsyncIterator[FramePublisher]:
    """A running publisher; what is queued at the end is still published."""
    publisher = FramePublisher(bus, coalesce_s)
    task = asyncio.create_task(publisher.run(), name="frames")
    try:
        yield publisher
        async with asyncio.timeout(5.0):
            await publisher.drained()
    finally:
        await end_task(task)
