"""What a client of the model store sees when the store is not there, silent, or gone."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.messages.codec import encode
from prism.common.messages.store import Deposited, LeaseRequest, StoreFailure
from prism.common.store_client import Lease, lease, lease_async

pytestmark = pytest.mark.core

REQUEST = LeaseRequest("m", "/models/m")
Ask = Callable[[Path, float], Awaitable[Lease]]


async def blocking(path: Path, deadline_s: float) -> Lease:
    return await asyncio.to_thread(lease, path, REQUEST, deadline_s)


async def in_the_loop(path: Path, deadline_s: float) -> Lease:
    return await lease_async(path, REQUEST, deadline_s)


both = pytest.mark.parametrize("ask", [blocking, in_the_loop])


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        yield listening


async def refusal(ask: Ask, path: Path, deadline_s: float = 10.0) -> PrismError:
    with pytest.raises(PrismError) as caught:
        await ask(path, deadline_s)
    return caught.value


def answering(listener: socket.socket, payload: bytes) -> threading.Thread:
    """Answer one request with `payload` and hang up."""

    def answer() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(65536)
            if payload:
                peer.send(payload)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


@both
async def test_no_store_is_told_at_once(ask: Ask, tmp_path: Path) -> None:
    error = await refusal(ask, tmp_path / "absent")
    assert error.code is ErrorCode.STORE_UNAVAILABLE
    assert error.retry
    assert str(tmp_path / "absent") in error.message


@both
async def test_a_store_that_goes_away_is_told(ask: Ask, listener: socket.socket, tmp_path: Path) -> None:
    thread = answering(listener, b"")
    error = await refusal(ask, tmp_path / "s")
    assert error.code is ErrorCode.STORE_UNAVAILABLE
    assert error.retry
    thread.join(10)


@both
async def test_a_silent_store_ends_at_the_deadline(ask: Ask, listener: socket.socket, tmp_path: Path) -> None:
    error = await refusal(ask, tmp_path / "s", 0.05)
    assert error.code is ErrorCode.DEADLINE_EXCEEDED
    assert threading.active_count() <= 1 + sum(t.daemon or "asyncio" in t.name for t in threading.enumerate())


@both
async def test_the_error_of_the_store_is_raised(ask: Ask, listener: socket.socket, tmp_path: Path) -> None:
    failure = StoreFailure(ErrorBody(ErrorCode.OUT_OF_MEMORY, "full", retry=True))
    thread = answering(listener, encode(failure))
    error = await refusal(ask, tmp_path / "s")
    assert error.body == failure.error
    thread.join(10)


@both
async def test_an_answer_to_something_else_is_refused(
    ask: Ask, listener: socket.socket, tmp_path: Path
) -> None:
    thread = answering(listener, encode(Deposited("0")))
    assert (await refusal(ask, tmp_path / "s")).code is ErrorCode.BAD_MESSAGE
    thread.join(10)
