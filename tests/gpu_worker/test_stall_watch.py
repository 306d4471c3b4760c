"""When an engine counts as stuck."""

import pytest

from prism.gpu_worker.stall_watch import StallWatch

pytestmark = pytest.mark.core

LIMIT_S = 10.0


def watch_at(*looks: float) -> StallWatch:
    watch = StallWatch(LIMIT_S, 0.25, looks[0])
    for look in looks[1:]:
        watch.looked(look)
    return watch


def steadily(until: float) -> StallWatch:
    return watch_at(*(step / 4 for step in range(int(until * 4) + 1)))


def test_an_engine_without_requests_may_be_silent_for_ever() -> None:
    assert steadily(100).silence_s(heard_at=0, working_since=None) is None


def test_silence_counts_from_when_it_was_last_heard() -> None:
    assert steadily(30).silence_s(heard_at=21, working_since=5) is None
    assert steadily(30).silence_s(heard_at=19, working_since=5) == 11


def test_silence_counts_from_when_it_got_work() -> None:
    assert steadily(30).silence_s(heard_at=0, working_since=25) is None
    assert steadily(30).silence_s(heard_at=0, working_since=15) == 15


def test_a_watch_that_was_held_up_itself_begins_anew() -> None:
    held_up = watch_at(0, 0.25, 60)
    assert held_up.silence_s(heard_at=0, working_since=0) is None
    for step in range(1, 42):
        held_up.looked(60 + step / 4)
    assert held_up.silence_s(heard_at=0, working_since=0) == 10.25
