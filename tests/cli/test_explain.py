"""What `prism explain` prints."""

import pytest

from prism.cli.explain import explanation_lines
from prism.common.messages.explain import ExplainedAction, ExplainedPlace, ExplainReply, ModelExplanation
from prism.common.messages.placement import CommandKind

pytestmark = pytest.mark.core


def test_one_model_in_full_says_what_it_was_weighed_by() -> None:
    places = [
        ExplainedPlace("worker-1", [0], "here", "it serves here", 0.5, 0.5, None, 0.0, 10**9, 2 * 10**9),
        ExplainedPlace(
            "worker-2", [1], "rejected", "idle models would have to sleep", 0.1, 0.6, 1.5, 0.3, 0, 9
        ),
    ]
    decided = [ExplainedAction(CommandKind.ACTIVATE, "m", "worker-1", "2 requests parked", 3.0, "active")]
    one = ModelExplanation(
        "m", "active on worker-1", 2, 0.25, 1.5, 300.0, 200.0, 0.5, 0.95, places=places, decided=decided
    )
    lines = explanation_lines(ExplainReply("scheduler-1", "balanced", [one]))
    assert lines[0] == "m: active on worker-1 (policy balanced, scheduler-1)"
    assert "1.50 requests/s" in lines[1]
    assert "95 %" in lines[1]
    assert lines[2].startswith("waiting: 2 requests")
    assert "activate on worker-1: 2 requests parked -> active" in lines[3]
    assert lines[-2].split()[:2] == ["worker-1[0]", "here"]
    assert lines[-1].endswith("idle models would have to sleep")


def test_several_models_in_brief() -> None:
    models = [ModelExplanation("a", "on no GPU"), ModelExplanation("b", "active on w", notes=["waits"])]
    lines = explanation_lines(ExplainReply("scheduler-1", "balanced", models))
    assert [line.split()[0] for line in lines] == ["MODEL", "a", "b"]
    assert "on no GPU" in lines[1]
    assert lines[2].rstrip().endswith("waits")
