"""Where a pinned model is, and how often, its operator says: no traffic changes that."""

import msgspec
import pytest
from tests.scheduling.placement.carrying_out import traffic
from tests.scheduling.placement.test_balanced import active, cluster, told
from tests.scheduling.placement.test_promises import view

from prism.common.messages.models import InitialPlacement

pytestmark = pytest.mark.core


def test_one_that_only_pauses_makes_room_for_a_pinned_model() -> None:
    pausing = msgspec.structs.replace(view("pausing", 30), traffic=traffic(1.0, last_s=1.0))
    it = cluster([pausing, view("pinned", 30, pin=True)], gpus=1)
    active(it, "pausing", "w0", idle_s=1.0)
    assert told(it) == [("Doze", "pausing", "w0")]


def test_a_pinned_model_that_has_moved_leaves_its_old_place_however_hot_it_is() -> None:
    hot = msgspec.structs.replace(
        view("hot", 8, pin=True, init_placements=[InitialPlacement([1])]), traffic=traffic(20.0, 2000.0, 50.0)
    )
    it = cluster([hot])
    active(it, "hot", "w0")
    active(it, "hot", "w1")
    it.held["w1", "hot"].since = it.now - 2.0
    assert told(it) == [("Doze", "hot", "w0")]
    it.held.pop(("w0", "hot"))
    assert told(it) == []


def test_its_first_requests_do_not_bring_it_up_elsewhere_to_move_it_then() -> None:
    it = cluster([view("pinned", 8, pin=True, init_placements=[InitialPlacement([1])])])
    it.ask(["pinned"])
    assert told(it) == [("Activate", "pinned", "w1")]
