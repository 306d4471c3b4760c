"""Weights that come through two buses; a lender's sessions are real, the driver is stood in for."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.gpu_worker.engine.mapping_driver import LENDING_STREAM, PIECE, MappingDriver, standing_in

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import create_memfd
from prism.gpu_worker.engine.cuda_arena import CudaArena
from prism.gpu_worker.engine.registered_image import RegisteredImage
from prism.gpu_worker.lent_bus import session
from prism.gpu_worker.lent_bus.borrowing import Buses, Turn
from prism.gpu_worker.lent_bus.lender import lending
from prism.gpu_worker.lent_bus.messages import Carry
from prism.gpu_worker.lent_bus.session import Bus

pytestmark = pytest.mark.core

NBYTES = 9 * PIECE + 100
ANSWER_DEADLINE_S = 10.0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> MappingDriver:
    monkeypatch.setattr("prism.gpu_worker.lent_bus.borrowing.ANSWER_DEADLINE_S", ANSWER_DEADLINE_S)
    return standing_in(monkeypatch)


@pytest.fixture
def fd() -> Iterator[int]:
    made = create_memfd("test-image", NBYTES)
    os.pwrite(made, bytes(index * 7 % 251 for index in range(NBYTES)), 0)
    yield made
    os.close(made)


@pytest.fixture
def image(driver: MappingDriver, fd: int) -> Iterator[RegisteredImage]:
    made = RegisteredImage(fd, NBYTES)
    for _ in made.pinned_pieces():
        pass
    yield made
    made.close()


@pytest.fixture
def bus(driver: MappingDriver, tmp_path: Path) -> Iterator[Bus]:
    """The bus of GPU-1, which is lent."""
    lent = Bus()
    with lending(tmp_path / "GPU-1", lent):
        yield lent


@pytest.fixture
def buses(tmp_path: Path, bus: Bus) -> Iterator[Buses]:
    """What an engine on GPU-0 sees."""
    made = Buses(tmp_path, ["GPU-0"])
    yield made
    made.close()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0)


def borrowed(buses: Buses, fd: int) -> list[Turn]:
    """A turn on every bus, as soon as the image is pinned there."""
    buses.offer(fd, NBYTES)
    turns: list[Turn] = []

    def lent() -> bool:
        turns[:] = buses.borrow()
        return bool(turns)

    until(lent)
    return turns


def asleep() -> CudaArena:
    arena = CudaArena(0, NBYTES, exportable=True)
    arena.used = NBYTES
    return arena


def content(arena: CudaArena) -> bytes:
    return ctypes.string_at(arena.address, NBYTES)


def test_each_bus_brings_every_other_piece(
    driver: MappingDriver, image: RegisteredImage, buses: Buses, fd: int
) -> None:
    arena = asleep()
    arrivals = arena.begin_copy_in(image, NBYTES, borrowed(buses, fd))
    arrivals.wait()
    assert content(arena) == ctypes.string_at(image.address, NBYTES)
    assert sorted(driver.streams) == 5 * [7] + 5 * [LENDING_STREAM]
    until(lambda: not driver.imported)
    arrivals.close()
    assert not driver.events
    assert driver.freed == {0}


def test_who_computes_waits_for_the_last_piece_of_each_bus_that_it_needs(
    driver: MappingDriver, image: RegisteredImage, buses: Buses, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None arrives before it is asked for.
    monkeypatch.setattr(Turn, "_more", lambda turn: turn._all_sent.wait() and False)
    turns = borrowed(buses, fd)
    arrivals = asleep().begin_copy_in(image, NBYTES, turns)
    own = [index for index, stream in enumerate(driver.streams) if stream == 7]
    assert len(own) == 5
    arrivals.hold_back(1)
    assert (len(driver.waits), driver.holds) == (1, [])
    arrivals.hold_back(4 * PIECE)
    assert (len(driver.waits), driver.holds) == (2, [(0, 2)])
    arrivals.hold_back(NBYTES)
    assert (len(driver.waits), driver.holds) == (3, [(0, 2), (0, 5)])
    arrivals.close()


def test_a_wake_of_its_own_keeps_the_bus_and_so_does_another_borrower(
    buses: Buses, bus: Bus, fd: int, tmp_path: Path
) -> None:
    (turn,) = borrowed(buses, fd)
    other = Buses(tmp_path, ["GPU-0"])
    other.offer(fd, NBYTES)
    assert other.borrow() == []
    turn.finish()
    other.close()
    (turn,) = borrowed(buses, fd)
    turn.finish()
    bus.keep()
    assert buses.borrow() == []
    bus.spare()
    (turn,) = borrowed(buses, fd)
    turn.finish()


def test_a_bus_is_its_owner_s_again_once_all_pieces_are_there(
    image: RegisteredImage, buses: Buses, fd: int, tmp_path: Path
) -> None:
    arrivals = asleep().begin_copy_in(image, NBYTES, borrowed(buses, fd))
    arrivals.wait()
    other = Buses(tmp_path, ["GPU-0"])
    (turn,) = borrowed(other, fd)
    turn.finish()
    other.close()
    arrivals.close()


def test_an_engine_that_is_gone_leaves_no_memory_mapped(
    driver: MappingDriver, image: RegisteredImage, buses: Buses, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gone = threading.Event(), threading.Event()
    waits = driver.wait_for_event

    def wait_for_event(event: int) -> None:
        if threading.current_thread().name == "copying":
            begun.set()
            gone.wait(ANSWER_DEADLINE_S)
        waits(event)

    monkeypatch.setattr("prism.gpu_worker.engine.cuda_driver.wait_for_event", wait_for_event)
    arrivals = asleep().begin_copy_in(image, NBYTES, borrowed(buses, fd))
    assert begun.wait(ANSWER_DEADLINE_S)
    buses.close()
    gone.set()
    until(lambda: not driver.imported)
    arrivals.wait()
    arrivals.close()


def test_a_copy_that_fails_leaves_no_memory_mapped_and_the_own_bus_brings_the_rest(
    driver: MappingDriver, image: RegisteredImage, buses: Buses, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = driver.copy_to_device

    def copy_to_device(target: int, source: int, nbytes: int, stream: int) -> None:
        if stream == LENDING_STREAM:
            raise PrismError(ErrorCode.INTERNAL, "the link to the neighbour is down")
        copies(target, source, nbytes, stream)

    turns = borrowed(buses, fd)
    monkeypatch.setattr("prism.gpu_worker.engine.cuda_driver.copy_to_device", copy_to_device)
    arena = asleep()
    arrivals = arena.begin_copy_in(image, NBYTES, turns)
    arrivals.wait()
    assert content(arena) == ctypes.string_at(image.address, NBYTES)
    until(lambda: not driver.imported)
    arrivals.close()


def test_a_pinning_that_failed_is_tried_again_with_the_next_offer(
    driver: MappingDriver, buses: Buses, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fails(address: int, nbytes: int) -> None:
        failed.set()
        raise PrismError(ErrorCode.OUT_OF_MEMORY, "no room for more pins")

    with monkeypatch.context() as full:
        full.setattr("prism.gpu_worker.engine.cuda_driver.register_host", fails)
        buses.offer(fd, NBYTES)
        assert failed.wait(ANSWER_DEADLINE_S)
        assert buses.borrow() == []

    def lent() -> bool:
        # The thread that failed may not have ended yet.
        buses.offer(fd, NBYTES)
        turns = buses.borrow()
        for turn in turns:
            turn.finish()
        return bool(turns)

    until(lent)


def test_what_a_lender_that_ends_did_not_bring_comes_by_the_own_bus(
    driver: MappingDriver,
    image: RegisteredImage,
    buses: Buses,
    fd: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = borrowed(buses, fd)
    carried = session.Session._carry

    def carry(self: session.Session, fds: list[int], message: Carry) -> None:
        if message.base:
            raise PrismError(ErrorCode.INTERNAL, "the lender's GPU fell off the bus")
        carried(self, fds, message)

    monkeypatch.setattr(session.Session, "_carry", carry)
    arena = asleep()
    arrivals = arena.begin_copy_in(image, NBYTES, turns)
    arrivals.wait()
    assert content(arena) == ctypes.string_at(image.address, NBYTES)
    arrivals.close()
    assert buses.borrow() == []
    monkeypatch.setattr(session.Session, "_carry", carried)
    (turn,) = borrowed(buses, fd)
    turn.finish()


def test_what_nobody_can_bring_is_told_and_holds_nobody_back(
    driver: MappingDriver, image: RegisteredImage, buses: Buses, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: session.Session, fds: list[int], message: Carry) -> None:
        raise PrismError(ErrorCode.INTERNAL, "the lender's GPU fell off the bus")

    monkeypatch.setattr(session.Session, "_carry", fails)
    turns = borrowed(buses, fd)

    def broken() -> None:
        raise PrismError(ErrorCode.INTERNAL, "so did ours")

    arena = asleep()
    monkeypatch.setattr(arena._stream, "synchronize", broken)
    arrivals = arena.begin_copy_in(image, NBYTES, turns)
    with pytest.raises(PrismError, match="so did ours"):
        arrivals.wait()
    assert driver.counters[0] >= 5
    monkeypatch.setattr(arena._stream, "synchronize", driver.copy_all)
    arrivals.close()


def test_an_image_is_let_go_of_with_its_engine(
    driver: MappingDriver, buses: Buses, bus: Bus, fd: int
) -> None:
    (turn,) = borrowed(buses, fd)
    assert driver.registered
    turn.finish()
    buses.close()
    until(lambda: not driver.registered)
