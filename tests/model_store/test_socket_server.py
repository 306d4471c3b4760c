"""The store's socket when the store itself is in trouble: whoever asked is told."""

import asyncio
import errno
import os
import resource
import socket
from pathlib import Path
from typing import NoReturn

import pytest
from tests.model_store.conftest import Running, eventually
from tests.model_store.model_folders import write_model
from tests.model_store.store_clients import borrow

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.store import LeaseRequest, StoreFailure, StoreReply
from prism.common.store_client import wait_readable
from prism.model_store import store

pytestmark = pytest.mark.core


async def answer_to(running: Running, payload: bytes) -> StoreReply:
    """What the store answers, once, to a message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.setblocking(False)
        asking.connect(str(running.socket))
        asking.send(payload)
        async with asyncio.timeout(10):
            await wait_readable(asking)
        reply: StoreReply = decode(asking.recv(65536), StoreReply)  # type: ignore[arg-type]
        return reply


async def test_a_message_that_is_none_is_answered(running: Running) -> None:
    reply = await answer_to(running, b'{"type": "unheard of"}')
    assert isinstance(reply, StoreFailure)
    assert reply.error.code is ErrorCode.BAD_MESSAGE


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.EPIPE])
async def test_an_error_of_the_work_is_answered_as_one(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(name: str, nbytes: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, "create_memfd", failing)
    with pytest.raises(PrismError, match=os.strerror(number)) as caught:
        await borrow(running, "m", write_model(tmp_path / "m"))
    assert caught.value.code is ErrorCode.INTERNAL
    assert not caught.value.retry


async def test_a_peer_that_goes_before_its_answer_is_no_error(
    running: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model(tmp_path / "m")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.connect(str(running.socket))
        asking.send(encode(LeaseRequest("m", str(folder))))
    with await borrow(running, "m", folder):
        pass
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


async def test_connections_wait_while_there_are_no_descriptors(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.setblocking(False)
        lowest_free = os.dup(asking.fileno())
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            asking.connect(str(running.socket))
            asking.send(b"{}")
            await eventually(lambda: "a connection could not be accepted" in caplog.text)
            for _ in range(100):
                await asyncio.sleep(0)
            assert caplog.text.count("a connection could not be accepted") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        async with asyncio.timeout(10):
            await wait_readable(asking)
        reply: StoreReply = decode(asking.recv(65536), StoreReply)  # type: ignore[arg-type]
        assert isinstance(reply, StoreFailure)
