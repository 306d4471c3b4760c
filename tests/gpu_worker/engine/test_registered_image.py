"""Images pinned piece by piece; only the driver's own calls are stood in for."""

import os
import threading
from collections.abc import Iterator

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import create_memfd
from prism.gpu_worker.engine import cuda_driver, registered_image
from prism.gpu_worker.engine.registered_image import RegisteredImage

PIECE = 1 << 20
NBYTES = 5 * PIECE + 4096


class FakeDriver:
    """What is registered now, and by which threads with which context."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.contexts: dict[int, str] = {}
        self.fails_at = -1
        self.waits_for: threading.Event | None = None

    def current_context(self) -> str:
        return "primary"

    def use_context(self, context: str) -> None:
        self.contexts[threading.get_ident()] = context

    def register_host(self, address: int, nbytes: int) -> None:
        assert self.contexts[threading.get_ident()] == "primary"
        if self.waits_for is not None and self.registered:
            assert self.waits_for.wait(10)
        if len(self.registered) == self.fails_at:
            raise PrismError(ErrorCode.OUT_OF_MEMORY, "no memory to pin")
        self.registered[address] = nbytes

    def unregister_host(self, address: int) -> None:
        del self.registered[address]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    for call in ("current_context", "use_context", "register_host", "unregister_host"):
        monkeypatch.setattr(cuda_driver, call, getattr(fake, call))
    monkeypatch.setattr(registered_image, "CHUNK_BYTES", PIECE)
    return fake


def pin(image: RegisteredImage) -> None:
    """Have all of it pinned."""
    assert sum(size for _, size in image.pinned_pieces()) == NBYTES


@pytest.fixture
def image(driver: FakeDriver) -> Iterator[RegisteredImage]:
    fd = create_memfd("test-image", NBYTES)
    made = RegisteredImage(fd, NBYTES)
    os.close(fd)
    yield made
    made.close()
    assert not driver.registered


@pytest.mark.parametrize("threads", [1, 4])
def test_every_piece_is_pinned_once_in_order(
    image: RegisteredImage, driver: FakeDriver, threads: int
) -> None:
    assert image.pinned_bytes == 0
    pieces = list(image.pinned_pieces(threads))
    assert pieces == [*((index * PIECE, PIECE) for index in range(5)), (5 * PIECE, 4096)]
    assert driver.registered == {image.address + offset: size for offset, size in pieces}
    assert image.pinned_bytes == NBYTES
    threads_before = len(driver.contexts)
    assert list(image.pinned_pieces()) == pieces
    assert len(driver.contexts) == threads_before, "what is pinned takes no threads any more"


def test_a_piece_can_be_used_while_later_ones_are_being_pinned(
    image: RegisteredImage, driver: FakeDriver
) -> None:
    driver.waits_for = threading.Event()
    pieces = image.pinned_pieces()
    assert next(pieces) == (0, PIECE)
    assert image.pinned_bytes == PIECE
    driver.waits_for.set()
    assert len(list(pieces)) == 5


def test_unpinned_it_stays_mapped_and_can_be_pinned_again(image: RegisteredImage, driver: FakeDriver) -> None:
    pin(image)
    address = image.address
    image.unpin()
    assert not driver.registered
    pin(image)
    assert image.address == address
    assert sum(driver.registered.values()) == NBYTES


def test_what_was_pinned_before_a_failure_stays_and_is_not_pinned_twice(
    image: RegisteredImage, driver: FakeDriver
) -> None:
    driver.fails_at = 3
    with pytest.raises(PrismError, match="no memory to pin"):
        pin(image)
    assert len(driver.registered) == 3
    driver.fails_at = -1
    pin(image)
    assert image.pinned_bytes == NBYTES


def test_whoever_stops_half_way_leaves_no_thread_at_work(image: RegisteredImage, driver: FakeDriver) -> None:
    before = threading.active_count()
    pieces = image.pinned_pieces(2)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_the_rest_is_pinned_behind_and_that_is_told(
    image: RegisteredImage, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    image.pin_behind()
    assert image._behind is not None
    image._behind.join(10)
    assert image.pinned_bytes == NBYTES
    assert caplog.text.count("image pinned") == 1
    assert sum(driver.registered.values()) == NBYTES, "no piece is pinned twice"
    image.unpin()
    assert image.pinned_bytes == 0


def test_pinning_behind_ends_after_the_piece_that_is_under_way(
    image: RegisteredImage, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered_image, "PIN_AFTER_S", 0.0)
    driver.waits_for = threading.Event()
    image.pin_behind()
    ending = threading.Thread(target=image.end_pinning_behind)
    ending.start()
    image._stop_behind.wait(10)
    driver.waits_for.set()
    ending.join(10)
    assert image.pinned_bytes < NBYTES
    assert not [thread for thread in threading.enumerate() if thread.name == "pin behind"]
