"""Which worker takes a request."""

import msgspec
import pytest

from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelState
from prism.gateway.routing import Failure, ModelVersion, WorkerView, choose_worker, common_failure

pytestmark = pytest.mark.core

NOW = 100.0


def view(
    *loads: ModelLoad, worker: str = "w", heard_at: float = NOW, sent: int = 0, draining: bool = False
) -> WorkerView:
    report = LoadReport(worker, "node", "cpu", [0], 1, 0, list(loads), draining=draining)
    return WorkerView(report, heard_at, sent)


def busy(queued: int, running: int, model: str = "m") -> ModelLoad:
    return ModelLoad(model, ModelState.ACTIVE, queued=queued, running=running)


def choose(workers: dict[str, WorkerView], avoid: tuple[str, ...] = ()) -> str | None:
    return choose_worker(workers, workers, NOW, silence_s=2.5, avoid=avoid)


def test_least_loaded_over_all_its_models_wins() -> None:
    assert choose({"a": view(busy(0, 1), busy(3, 3, "other")), "b": view(busy(2, 2))}) == "b"


def test_what_was_sent_since_the_report_counts() -> None:
    assert choose({"a": view(busy(0, 1), sent=2), "b": view(busy(0, 2))}) == "b"


def test_equal_loads_go_by_name() -> None:
    assert choose({"b": view(), "a": view()}) == "a"


def test_silent_draining_and_avoided_workers_are_left_out() -> None:
    workers = {
        "silent": view(heard_at=NOW - 2.6),
        "draining": view(draining=True),
        "avoided": view(),
        "slow": view(busy(9, 9), heard_at=NOW - 2.4),
    }
    assert choose(workers, avoid=("avoided",)) == "slow"
    assert choose(workers, avoid=("avoided", "slow")) is None


def test_route_of_an_unknown_worker_is_no_choice() -> None:
    assert choose_worker(["ghost"], {}, NOW, silence_s=2.5) is None


def test_failure_counts_when_every_worker_reports_it() -> None:
    failed = ModelLoad("m", ModelState.FAILED, state_s=3.0, failure="no memory")
    earlier = ModelLoad("m", ModelState.FAILED, state_s=60.0, failure="no memory")
    workers = [view(failed, heard_at=NOW - 0.5), view(earlier)]
    assert common_failure("m", workers, NOW) == Failure("no memory", 3.5)
    assert common_failure("m", [view(failed), view(busy(0, 0))], NOW) is None
    assert common_failure("m", [view(failed), view()], NOW) is None
    assert common_failure("m", [], NOW) is None


def test_an_engine_of_another_version_is_no_choice() -> None:
    old = view(msgspec.structs.replace(busy(0, 0), version="old"))
    new = view(msgspec.structs.replace(busy(9, 9), version="new"))
    untold = view(busy(4, 4))
    workers = {"old": old, "new": new, "untold": untold}

    def choose_of(version: str, *names: str) -> str | None:
        wanted = ModelVersion("m", version)
        return choose_worker(names, workers, NOW, silence_s=2.5, wanted=wanted)

    assert choose_of("new", "old", "new") == "new"
    assert choose_of("old", "old", "new") == "old"
    assert choose_of("newer", "old", "new") is None
    assert choose_of("new", "new", "untold") == "untold", "it may be of that version"
