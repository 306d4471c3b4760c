"""Who waits for what while weights are on their way."""

import threading
import time
from collections.abc import Callable

import pytest

from prism.gpu_worker.engine.arrivals import Arrivals


class Recorded:
    """A piece that is there at once, and notes who waits for it."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self._name = name
        self._notes = notes

    def hold_back(self) -> None:
        self._notes.append(f"held back by {self._name}")

    def wait(self) -> None:
        self._notes.append(f"waited for {self._name}")


def arrivals_of(notes: list[str], ended: Callable[[], None] = lambda: None, began: float = 0.0) -> Arrivals:
    """Three pieces: up to byte 10, 20 and 25."""
    pieces = [(end, Recorded(str(end), notes)) for end in (10, 20, 25)]
    return Arrivals(pieces, began, ended)


@pytest.mark.parametrize(
    ("needed", "piece"), [(1, "10"), (10, "10"), (11, "20"), (20, "20"), (25, "25"), (99, "25")]
)
def test_one_is_held_back_by_the_piece_that_brings_the_last_byte_it_needs(needed: int, piece: str) -> None:
    notes: list[str] = []
    arrivals_of(notes).hold_back(needed)
    assert notes == [f"held back by {piece}"]


def test_who_needs_nothing_is_not_held_back() -> None:
    notes: list[str] = []
    arrivals_of(notes).hold_back(0)
    Arrivals([], 0.0, lambda: None).hold_back(5)
    assert notes == []


def test_once_all_are_there_nobody_is_held_back() -> None:
    notes: list[str] = []
    arrivals = arrivals_of(notes)
    assert not arrivals.all_here
    arrivals.wait()
    assert arrivals.all_here
    assert notes == ["waited for 10", "waited for 20", "waited for 25"]
    arrivals.hold_back(25)
    assert len(notes) == 3


@pytest.mark.parametrize(("elapsed_s", "left_s", "waited"), [(1.0, 2.0, 1), (1.0, 1.0, 2), (1.0, 0.1, 3)])
def test_the_rest_is_judged_by_how_fast_the_others_came(
    monkeypatch: pytest.MonkeyPatch, elapsed_s: float, left_s: float, waited: int
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: elapsed_s)
    notes: list[str] = []
    arrivals = arrivals_of(notes)
    arrivals.wait(left_s)
    # After the first 10 of 25 bytes at 10 a second 1.5 s are left, after 20 at 20 a second 0.25 s.
    assert len(notes) == waited
    assert arrivals.all_here == (waited == 3)


def test_nothing_on_its_way_is_all_there() -> None:
    arrivals = Arrivals([], 0.0, lambda: None)
    assert arrivals.all_here
    assert arrivals.nbytes == 0
    arrivals.wait()


def test_what_copies_needed_is_given_back_once() -> None:
    ended: list[int] = []
    arrivals = arrivals_of([], lambda: ended.append(1))
    arrivals.close()
    arrivals.close()
    assert ended == [1]


def test_a_copy_that_failed_is_told_of() -> None:
    class Broken(Recorded):
        def wait(self) -> None:
            raise OSError("the image ends")

    arrivals = Arrivals([(10, Broken("10", []))], 0.0, lambda: None)
    with pytest.raises(OSError, match="the image ends"):
        arrivals.wait()
    assert not arrivals.all_here


def test_another_thread_sees_that_all_are_there() -> None:
    arrivals = arrivals_of([])
    thread = threading.Thread(target=arrivals.wait)
    thread.start()
    thread.join()
    assert arrivals.all_here
