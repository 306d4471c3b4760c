"""Ranks that a shell starts, each with a GPU of its own: who they are, and what they are handed."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine.cuda_shell import StartedRanks
from prism.gpu_worker.engine.process_group import INIT_METHOD, meet_in_memory
from prism.gpu_worker.engine.ranks import Ranks, lead_ranks
from prism.gpu_worker.engine_protocol import Dying, MessageBuffer, StartEngine, unpack_from_engine

MODULE = "tests.gpu_worker.engine.rank_process"
START = StartEngine(
    call=1,
    model="m",
    model_path="/m",
    store_socket="/s",
    layout="tp0of3",
    dtype="auto",
    kv_bytes=900,
    max_running_requests=1,
    chunked_prefill_tokens=1,
    copy_threads=1,
    store_deadline_s=1.0,
    rank_layouts=["tp0of3", "tp1of3", "tp2of3"],
)


def said(connection: socket.socket) -> str:
    """What a rank has said before it ended."""
    connection.settimeout(20)
    buffer = MessageBuffer()
    while True:
        for body in buffer.feed(connection.recv(4096)):
            message = unpack_from_engine(body)
            assert isinstance(message, Dying)
            return message.reason


@contextmanager
def started_ranks(size: int) -> Iterator[StartedRanks]:
    """Ranks as a shell starts them, all gone at the end."""
    group = meet_in_memory()
    started = StartedRanks(size, [group], MODULE)
    try:
        yield started
    finally:
        for connection in started.sockets:
            connection.close()
        for process in started.processes:
            process.wait(20)
        os.close(group)


def test_ranks_are_started_told_what_to_become_and_meet_in_the_same_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(INIT_METHOD, "")
    ours, theirs = socket.socketpair()
    with started_ranks(3) as started, ours, theirs:
        assert started.get_warm()
        ranks, part = lead_ranks(started.sockets, START, ours)
        assert (ranks, part.layout) == (Ranks(0, 3), "tp0of3")
        assert part.kv_bytes == START.kv_bytes, "each has so much on its own GPU"
        told = [said(other) for other in started.sockets]
        assert told == ["1 of 3: tp1of3, True", "2 of 3: tp2of3, True"]


def test_a_rank_that_ends_before_it_is_warm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INIT_METHOD, "")
    monkeypatch.setenv("DIES", "yes")
    with started_ranks(2) as started:
        assert not started.get_warm()


def test_an_engine_for_another_number_of_gpus_is_refused() -> None:
    ours, theirs = socket.socketpair()
    alone = msgspec.structs.replace(START, rank_layouts=["tp0of1"])
    refused = pytest.raises(PrismError, match="wants tp_size 1; the engines of this worker have 2")
    with ours, theirs, refused as error:
        lead_ranks([theirs], alone, ours)
    assert error.value.code is ErrorCode.UNSUPPORTED


def test_what_one_rank_gathers_is_its_own() -> None:
    assert Ranks().gather("a") == ["a"]


def test_what_fails_is_raised_and_what_succeeded_stays() -> None:
    done: list[str] = []
    Ranks().together(lambda: done.append("run"), undo=lambda: done.append("undone"))

    def fail() -> None:
        raise PrismError(ErrorCode.OUT_OF_MEMORY, "no room")

    with pytest.raises(PrismError, match="no room"):
        Ranks().together(fail, undo=lambda: done.append("undone"))
    assert done == ["run"]
