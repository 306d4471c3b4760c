"""What a client of the model store sees when the store is not there, silent, or gone."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.messages.codec import encode
from prism.common.messages.store import Deposited, LeaseRequest, StoreFailure
from prism.common.store_client import lease

pytestmark = pytest.mark.core

REQUEST = LeaseRequest("m", "/models/m")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        yield listening


def refusal(path: Path, deadline_s: float = 10.0) -> PrismError:
    with pytest.raises(PrismError) as caught:
        lease(path, REQUEST, deadline_s)
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


def test_no_store_is_told_at_once(tmp_path: Path) -> None:
    error = refusal(tmp_path / "absent")
    assert error.code is ErrorCode.STORE_UNAVAILABLE
    assert error.retry
    assert str(tmp_path / "absent") in error.message


def test_a_store_that_goes_away_is_told(listener: socket.socket, tmp_path: Path) -> None:
    thread = answering(listener, b"")
    error = refusal(tmp_path / "s")
    assert error.code is ErrorCode.STORE_UNAVAILABLE
    assert error.retry
    thread.join(10)


def test_a_silent_store_ends_at_the_deadline(listener: socket.socket, tmp_path: Path) -> None:
    error = refusal(tmp_path / "s", 0.05)
    assert error.code is ErrorCode.DEADLINE_EXCEEDED
    assert threading.active_count() <= 1 + sum(t.daemon or "asyncio" in t.name for t in threading.enumerate())


def test_the_error_of_the_store_is_raised(listener: socket.socket, tmp_path: Path) -> None:
    failure = StoreFailure(ErrorBody(ErrorCode.OUT_OF_MEMORY, "full", retry=True))
    thread = answering(listener, encode(failure))
    error = refusal(tmp_path / "s")
    assert error.body == failure.error
    thread.join(10)


def test_an_answer_to_something_else_is_refused(listener: socket.socket, tmp_path: Path) -> None:
    thread = answering(listener, encode(Deposited("0")))
    assert (refusal(tmp_path / "s")).code is ErrorCode.BAD_MESSAGE
    thread.join(10)
