"""An explanation says what the plan does, and why not otherwise."""

import pytest
from tests.scheduling.placement.carrying_out import GB, Cluster, Held
from tests.scheduling.placement.test_balanced import active, cluster
from tests.scheduling.placement.test_promises import view

from prism.common.messages.explain import ExplainedPlace, ModelExplanation
from prism.common.messages.models import ModelState
from prism.scheduling.placement import policies
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.explanation import explain

pytestmark = pytest.mark.core


def explained(it: Cluster, name: str) -> ModelExplanation:
    found = explain(it.policy, it.snapshot(), it.now, name)
    assert found is not None
    return found


def places(it: Cluster, name: str) -> dict[str, ExplainedPlace]:
    return {place.worker: place for place in explained(it, name).places}


def test_what_the_plan_does_is_what_is_chosen() -> None:
    it = cluster([view("busy", 8, 2.0), view("new", 8)])
    active(it, "busy", "w0")
    it.ask(["new"])
    found = explained(it, "new")
    assert found.next == ["activate on w1: 1 requests parked"]
    assert found.parked == 1
    there = places(it, "new")
    assert (there["w1"].verdict, there["w0"].verdict) == ("chosen", "rejected")
    assert there["w1"].seconds is not None
    assert there["w0"].seconds is not None
    assert there["w1"].seconds < there["w0"].seconds
    assert there["w0"].pressure > there["w1"].pressure == 0.0


def test_those_who_would_have_to_sleep_are_named() -> None:
    it = cluster([view("idle", 30), view("new", 14)], gpus=1)
    active(it, "idle", "w0")
    it.ask(["new"])
    there = places(it, "new")["w0"]
    assert there.sleeps == ["idle"]
    assert there.why == "idle models would have to sleep"


def test_for_how_long_a_request_must_wait_until_busy_ones_sleep() -> None:
    it = cluster([view("busy", 30, 1.0), view("new", 30)], gpus=1)
    active(it, "busy", "w0", idle_s=0.0)
    it.running = {"busy"}
    for asked in (False, True):
        if asked:
            it.ask(["new"])
        there = places(it, "new")["w0"]
        assert there.sleeps == ["busy"]
        assert there.why == "busy models would have to sleep, once a request has waited for 2 s"


def test_where_it_serves_and_why_not_elsewhere() -> None:
    it = cluster([view("a", 8, 1.0)], limit=20 * GB)
    active(it, "a", "w0")
    found = explained(it, "a")
    assert found.summary == "active on w0"
    there = places(it, "a")
    assert there["w0"].verdict == "here"
    assert "it serves elsewhere" in there["w1"].why


def test_what_can_never_be() -> None:
    it = cluster([view("large", 30)], limit=20 * GB)
    assert "too large" in places(it, "large")["w0"].why


def test_a_sleeping_model_and_an_unknown_one() -> None:
    it = cluster([view("a", 8)])
    it.held["w0", "a"] = Held(ModelState.DOZING, (0,))
    assert explained(it, "a").summary == "asleep on w0 (dozing)"
    assert explain(it.policy, it.snapshot(), it.now, "nobody") is None


@pytest.mark.parametrize("name", sorted(policies))
def test_every_policy_can_be_asked(name: str) -> None:
    it = cluster([view("a", 8, 1.0), view("b", 8)], policy=policies[name]())
    active(it, "a", "w0")
    it.ask(["b"])
    assert explained(it, "a").places[0].verdict == "here"
    assert [place.verdict for place in explained(it, "b").places].count("chosen") == 1
    brief = explain(it.policy, it.snapshot(), it.now, "a", Board(it.snapshot(), it.now))
    assert brief is not None
    assert (brief.summary, brief.places) == ("active on w0", [])
