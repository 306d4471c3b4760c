"""Frames of many requests on their way to gateways, over a real bus."""

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorBody, ErrorCode
from prism.common.messages.codec import decode
from prism.common.messages.generation import Finish, TokenFrame, TokenLogprob
from prism.gpu_worker.frames import LARGEST_MESSAGE_BYTES, FrameStream, frame_publisher

pytestmark = pytest.mark.core

DEADLINE_S = 10.0
GATEWAY = "gateway-1"


class Received:
    """Messages for the gateway: their subjects, and all frames in the order of their coming."""

    def __init__(self) -> None:
        self.subjects: list[str] = []
        self.sizes: list[int] = []
        self.frames: list[TokenFrame] = []
        self._changed = asyncio.Event()

    async def take(self, message: Msg) -> None:
        self.subjects.append(message.subject)
        self.sizes.append(len(message.data))
        if message.subject == subjects.reply_frames(GATEWAY):
            self.frames += decode(message.data, list[TokenFrame])
        else:
            self.frames.append(decode(message.data, TokenFrame))
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def of(self, rid: str) -> list[TokenFrame]:
        return [frame for frame in self.frames if frame.rid == rid]


@pytest.fixture
async def received(bus: Bus) -> AsyncIterator[Received]:
    taken = Received()
    subscription = await bus.subscribe(subjects.replies(GATEWAY), taken.take, inline=True)
    await bus.flush()
    yield taken
    await subscription.unsubscribe()


def ended(received: Received) -> Callable[[], bool]:
    return lambda: any(frame.finish or frame.error for frame in received.frames)


async def test_frames_of_one_step_travel_together_each_with_its_own_token(
    bus: Bus, received: Received
) -> None:
    async with frame_publisher(bus) as publisher:
        rids = [f"{index:032x}" for index in range(150)]
        streams = [FrameStream(publisher, subjects.reply(GATEWAY, rid), rid, GATEWAY) for rid in rids]
        for step in range(2):
            for index, stream in enumerate(streams):
                stream.tokens([index * 10 + step], None)
        await received.until(lambda: len(received.frames) == 300)
    assert len(received.subjects) == 5
    for index, rid in enumerate(rids):
        assert [(frame.seq, frame.tokens) for frame in received.of(rid)] == [
            (0, [index * 10]),
            (1, [index * 10 + 1]),
        ]


async def test_whoever_gave_no_gateway_gets_frames_on_the_reply_subject_alone(
    bus: Bus, received: Received
) -> None:
    async with frame_publisher(bus) as publisher:
        named = FrameStream(publisher, subjects.reply(GATEWAY, "a"), "a", GATEWAY)
        unnamed = FrameStream(publisher, subjects.reply(GATEWAY, "b"), "b")
        elsewhere = FrameStream(publisher, subjects.reply(GATEWAY, "c"), "c", "gateway-2")
        for stream in (named, unnamed, elsewhere):
            stream.tokens([1], None)
        await received.until(lambda: len(received.frames) == 3)
    assert sorted(received.subjects) == [subjects.reply(GATEWAY, rid) for rid in "abc"]


async def test_large_frames_are_spread_over_messages(bus: Bus, received: Received) -> None:
    scores = [TokenLogprob(-1.0, [(token, -2.0) for token in range(2000)])]
    async with frame_publisher(bus) as publisher:
        for index in range(20):
            FrameStream(publisher, subjects.reply(GATEWAY, str(index)), str(index), GATEWAY).tokens(
                [1], scores
            )
        await received.until(lambda: len(received.frames) == 20)
    assert len(received.sizes) > 1
    assert max(received.sizes) <= LARGEST_MESSAGE_BYTES


async def test_coalescing_merges_tokens_and_loses_none(bus: Bus, received: Received) -> None:
    score = TokenLogprob(-0.5)
    async with frame_publisher(bus, coalesce_s=60.0) as publisher:
        stream = FrameStream(publisher, subjects.reply(GATEWAY, "a"), "a", GATEWAY)
        stream.alive()
        for token in range(5):
            stream.tokens([token], [score])
        stream.finish([5], [score], Finish("length", 1, 6))
        await received.until(ended(received))
    accepted, first, last = received.of("a")
    assert (accepted.seq, accepted.tokens) == (0, [])
    assert (first.seq, first.tokens) == (1, [0])
    assert (last.seq, last.tokens, len(last.logprobs or [])) == (2, [1, 2, 3, 4, 5], 5)


async def test_tokens_that_were_held_back_go_out_when_their_time_is_up(bus: Bus, received: Received) -> None:
    async with frame_publisher(bus, coalesce_s=0.01) as publisher:
        stream = FrameStream(publisher, subjects.reply(GATEWAY, "a"), "a", GATEWAY)
        for token in range(4):
            stream.tokens([token], None)
        await received.until(lambda: sum(len(frame.tokens) for frame in received.frames) == 4)
        assert [frame.tokens for frame in received.frames] == [[0], [1, 2, 3]]


async def test_a_failure_comes_after_the_tokens_before_it(bus: Bus, received: Received) -> None:
    async with frame_publisher(bus, coalesce_s=60.0) as publisher:
        stream = FrameStream(publisher, subjects.reply(GATEWAY, "a"), "a", GATEWAY)
        stream.tokens([1], None)
        stream.tokens([2], None)
        stream.fail(ErrorBody(ErrorCode.ENGINE_LOST, "gone", retry=True))
        stream.tokens([3], None)
        await received.until(ended(received))
    assert [frame.tokens for frame in received.frames] == [[1], [2], []]
    assert [frame.seq for frame in received.frames] == [0, 1, 2]


async def test_what_is_held_back_at_the_end_is_published(bus: Bus, received: Received) -> None:
    async with frame_publisher(bus, coalesce_s=60.0) as publisher:
        stream = FrameStream(publisher, subjects.reply(GATEWAY, "a"), "a", GATEWAY)
        stream.tokens([1], None)
        stream.tokens([2], None)
    await received.until(lambda: len(received.frames) == 2)
    assert msgspec.structs.asdict(received.frames[1])["tokens"] == [2]
