"""When a model that failed on a worker may be tried there again."""

from prism.scheduling.placement.snapshot import Failure

FIRST_S = 1.0
LONGEST_S = 60.0


def delay(count: int) -> float:
    """Seconds to wait after `count` (at least 1) failures in a row: FIRST_S, doubling up to LONGEST_S."""
    return float(min(LONGEST_S, FIRST_S * 2.0 ** min(count - 1, 30)))


class BackoffTable:
    """Failures in a row by worker and model, with the time of the next try, on the caller's clock."""

    def __init__(self) -> None:
        self._failures: dict[tuple[str, str], Failure] = {}

    def failed(self, worker: str, model: str, reason: str, now: float) -> Failure:
        """Record one more failure."""
        before = self._failures.get((worker, model))
        count = before.count + 1 if before else 1
        failure = Failure(worker, model, count, now + delay(count), reason)
        self._failures[worker, model] = failure
        return failure

    def works(self, worker: str, model: str) -> None:
        """Start counting from nothing."""
        self._failures.pop((worker, model), None)

    def forget_worker(self, worker: str) -> None:
        """Drop all that concerns a worker that is gone."""
        self._failures = {key: failure for key, failure in self._failures.items() if key[0] != worker}

    def failures(self) -> tuple[Failure, ...]:
        """All of them, those whose time has come included."""
        return tuple(self._failures.values())
