"""Frames that have come for a gateway, handed to the attempts that wait for them."""

import asyncio

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import encode
from prism.common.messages.generation import TokenFrame
from prism.gateway.replies import Inbox, Replies

pytestmark = pytest.mark.core

GATEWAY = "gateway-1"


def message(subject: str, payload: object) -> Msg:
    data = payload if isinstance(payload, bytes) else encode(payload)
    return Msg(_client=Client(), subject=subject, data=data)


def soon() -> float:
    return asyncio.get_running_loop().time() + 10.0


def at_once() -> float:
    return asyncio.get_running_loop().time()


async def nothing_in(inbox: Inbox) -> bool:
    try:
        await inbox.get(at_once())
    except TimeoutError:
        return True
    return False


async def test_frames_of_several_requests_in_one_message_reach_each_its_own() -> None:
    replies = Replies()
    with replies.open("a", "w") as one, replies.open("b", "w") as other, replies.open("c", "w") as third:
        frames = [
            TokenFrame("a", 0, [1]),
            TokenFrame("b", 0, [2]),
            TokenFrame("x", 0, [9]),
            TokenFrame("a", 1, [3]),
        ]
        await replies.take(message(subjects.reply_frames(GATEWAY), frames))
        await replies.take(message(subjects.reply(GATEWAY, "b"), TokenFrame("b", 1, [4])))
        assert [frame.tokens for frame in await one.get(soon())] == [[1], [3]]
        assert [frame.tokens for frame in await other.get(soon())] == [[2], [4]]
        assert await nothing_in(third)


async def test_a_message_that_cannot_be_read_leaves_the_others_alone() -> None:
    replies = Replies()
    with replies.open("a", "w") as inbox:
        await replies.take(message(subjects.reply_frames(GATEWAY), b'[{"rid": 1}]'))
        await replies.take(message(subjects.reply_frames(GATEWAY), [TokenFrame("a", 0, [1])]))
        assert [frame.tokens for frame in await inbox.get(soon())] == [[1]]


async def test_what_came_before_an_error_is_read_before_it() -> None:
    inbox = Inbox("w")
    inbox.put(TokenFrame("a", 0, [1]))
    inbox.put(PrismError(ErrorCode.ENGINE_LOST, "gone", retry=True))
    inbox.put(TokenFrame("a", 1, [2]))
    assert [frame.tokens for frame in await inbox.get(soon())] == [[1]]
    for _ in range(2):
        with pytest.raises(PrismError, match="gone"):
            await inbox.get(soon())


async def test_a_wait_ends_at_its_own_time_whatever_the_one_before_was() -> None:
    inbox = Inbox("w")
    far = asyncio.create_task(inbox.get(soon()))
    await asyncio.sleep(0)
    inbox.put(TokenFrame("a", 0, [1]))
    assert len(await far) == 1
    # Earlier than the timer that the first wait has set.
    began = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError):
        await inbox.get(began + 0.05)
    # Later than the one of the second.
    later = asyncio.create_task(inbox.get(soon()))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(later), 0.1)
    inbox.put(TokenFrame("a", 1, [2]))
    assert len(await later) == 1
    inbox.close()
