"""What `prism status`, `prism models` and `prism events` print of what they see."""

import msgspec
import pytest

from prism.cli.events import event_line
from prism.cli.models import model_lines, model_rows
from prism.cli.retry import outcome_line
from prism.cli.status import status_lines
from prism.cli.system_view import ServiceView, SystemView
from prism.cli.table import aligned, megabytes, seconds
from prism.common.errors import ErrorBody, ErrorCode
from prism.common.messages.events import Event
from prism.common.messages.explain import ExplainedAction, ExplainedDemand, ExplainedNote, PlanReport
from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import CommandKind, Route
from prism.common.messages.retry import RetryOutcome
from prism.common.messages.store import StoreReport

pytestmark = pytest.mark.core


def facts(model: str, error: str | None = None) -> ModelFacts:
    return ModelFacts(model, error=error)


VIEW = SystemView(
    nats="127.0.0.1:4222",
    services=[
        ServiceView("gateway", "gateway-1", "0.1.0", {"node": "n", "pid": "7", "url": "http://here"}),
        ServiceView("global_scheduler", "scheduler-1", "0.1.0", {"node": "n", "pid": "8"}),
        ServiceView("gpu_worker", "worker-1", "0.1.0", {"node": "n", "pid": "9", "device": "cpu"}),
        ServiceView("model_store", "store-1", "0.1.0", {"node": "n", "pid": "10"}),
    ],
    workers=[
        LoadReport(
            *("worker-1", "n", "cpu", [0], 240_000_000, 45_000_000),
            models=[
                ModelLoad("a", ModelState.ACTIVE, 2, 3, 25_000_000, 20_000_000, 1_000_000, state_s=90.0),
                ModelLoad("b", ModelState.FAILED, failure="its weights are torn"),
            ],
        )
    ],
    stores={"store-1": StoreReport("n", 1_000_000_000, 50_000_000)},
    plan=PlanReport(
        *("scheduler-1", "scheduler-1", 4, "lru", 4),
        actions=[ExplainedAction(CommandKind.ACTIVATE, "a", "worker-1", "2 requests parked", 3.0, "active")],
        notes=[ExplainedNote("c", "waits for memory")],
        demand=[ExplainedDemand("c", 5, 1.5), ExplainedDemand("a", 0, 0.0)],
    ),
    specs=[ModelSpec(name, f"/m/{name}") for name in "abcde"],
    facts={name: facts(name) for name in "abc"} | {"d": facts("d", "no config.json")},
    routes=[Route("a", "worker-1", "n")],
)


def test_models_stand_beside_their_workers_or_alone() -> None:
    rows = {row.model: row for row in model_rows(VIEW)}
    assert (rows["a"].worker, rows["a"].routed, rows["a"].running) == ("worker-1", True, 3)
    assert (rows["b"].state, rows["b"].note) == (ModelState.FAILED, "its weights are torn")
    assert (rows["c"].state, rows["c"].parked, rows["c"].note) == (ModelState.COLD, 5, "waits for memory")
    assert (rows["d"].state, rows["d"].note) == (ModelState.FAILED, "no config.json")
    assert rows["e"].note == "no model store has read its folder yet"


def test_a_model_on_two_workers_has_two_rows() -> None:
    second = msgspec.structs.replace(VIEW.workers[0], worker="worker-2")
    rows = model_rows(msgspec.structs.replace(VIEW, workers=[*VIEW.workers, second]))
    assert [(row.worker, row.routed) for row in rows if row.model == "a"] == [
        ("worker-1", True),
        ("worker-2", False),
    ]


def test_the_table_of_models_lines_up() -> None:
    header, *lines = model_lines(model_rows(VIEW))
    assert len(lines) == len(VIEW.specs)
    assert header.split()[:4] == ["MODEL", "STATE", "SINCE", "WORKER"]
    assert lines[0].index("active") == header.index("STATE")


def test_status_names_services_workers_stores_and_decisions() -> None:
    text = "\n".join(status_lines(VIEW))
    for told in (
        "url=http://here",
        "45 MB of 240 MB",
        "1 active, 1 failed",
        "50 MB of 1000 MB",
        "scheduler-1 leads, epoch 4, policy lru",
        "waiting: 5 requests for c, 1.5 s the oldest",
        "note: c waits for memory",
        "3.0 s ago: activate a on worker-1: 2 requests parked -> active",
        "all four services answer",
    ):
        assert told in text
    assert "requests for a," not in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"services": VIEW.services[1:]}, "no gateway answers"),
        ({"plan": PlanReport("s", "", 0, "lru", 0)}, "no global_scheduler leads"),
        ({"workers": []}, "worker worker-1 reports no load"),
    ],
)
def test_what_is_missing_is_a_problem(change: dict[str, object], problem: str) -> None:
    broken = msgspec.structs.replace(VIEW, **change)
    assert broken.problems() == [problem]
    assert status_lines(broken)[-1] == f"problem: {problem}"
    assert VIEW.problems() == []


def test_events_say_what_of_whom_and_how_long() -> None:
    line = event_line(
        Event(
            "activated", "a", "worker-1", "worker-1", "from dozing", {"copy": 0.0213}, {"weights": 25_000_000}
        )
    )
    assert line.split()[:2] == ["activated", "a"]
    assert line.endswith("from dozing weights 25 MB copy 0.021 s")
    assert "on worker-9 (scheduler-1) no load report" in event_line(
        Event("lost", "", "scheduler-1", "worker-9", "no load report")
    )


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = aligned(("name", "n"), [("a", "1"), ("longer", "1000")], right=(1,))
    assert lines == ["NAME       N", "a          1", "longer  1000"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MB"), (25_400_000, "25 MB"), (9_999_000_000, "9999 MB"), (1.6e10, "16.0 GB")]
)
def test_bytes_are_read_in_mb_or_gb(count: float, text: str) -> None:
    assert megabytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.4, "59 s"), (600, "10 min"), (7300, "2 h")]
)
def test_times_are_read_in_s_min_or_h(count: float, text: str) -> None:
    assert seconds(count) == text


def test_a_retry_that_fails_says_why_and_of_a_model_that_nobody_knows_no_more_than_that() -> None:
    torn = ErrorBody(ErrorCode.MODEL_FAILED, "its weights are torn")
    assert outcome_line(RetryOutcome("a", ModelState.FAILED, torn)) == "a is failed: its weights are torn"
    unknown = ErrorBody(ErrorCode.MODEL_NOT_FOUND, "no model 'b' is registered")
    assert outcome_line(RetryOutcome("b", ModelState.FAILED, unknown)) == "no model 'b' is registered"
