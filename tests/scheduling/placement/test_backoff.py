"""Back-off: 1 s, doubling to 60 s, forgotten with success or with the worker."""

import pytest

from prism.scheduling.placement.backoff import BackoffTable, delay

pytestmark = pytest.mark.core


def test_the_delay_doubles_up_to_a_minute() -> None:
    assert [delay(count) for count in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delay(10_000) == 60


def test_failures_in_a_row_push_the_next_try_further_away() -> None:
    table = BackoffTable()
    table.failed("w", "m", "first", 100.0)
    failure = table.failed("w", "m", "second", 200.0)
    assert (failure.count, failure.retry_at, failure.reason) == (2, 202.0, "second")
    assert table.failures() == (failure,)


def test_success_and_the_loss_of_the_worker_wipe_the_slate() -> None:
    table = BackoffTable()
    for worker, model in (("w", "a"), ("w", "b"), ("v", "a")):
        table.failed(worker, model, "", 0.0)
    table.works("w", "a")
    table.works("w", "never failed")
    assert {(failure.worker, failure.model) for failure in table.failures()} == {("w", "b"), ("v", "a")}
    table.forget_worker("w")
    assert {(failure.worker, failure.model) for failure in table.failures()} == {("v", "a")}
