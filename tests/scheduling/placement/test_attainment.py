"""How many requests are on time: who is worth having on a GPU, and who is not."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.placement.carrying_out import GB, Cluster, Held, traffic
from tests.scheduling.placement.test_balanced import active, cluster, told
from tests.scheduling.placement.test_promises import view

from prism.common.messages.models import ModelState
from prism.scheduling.placement.attainment import gain_of, gain_without, kept_per_s, kept_share
from prism.scheduling.placement.balanced import BalancedPlacement
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Gpu, Place
from prism.scheduling.placement.pressure import Work
from prism.scheduling.placement.snapshot import ModelView, WorkerView

pytestmark = pytest.mark.core

works = st.builds(
    Work,
    kv_bytes=st.just(0.0),
    compute=st.floats(0.0, 1.0),
    activity=st.floats(0.01, 1.0),
    tightness=st.floats(0.0, 0.3),
    requests_per_s=st.floats(0.0, 5.0),
)


def gpu(*members: Work) -> Gpu:
    found = Gpu(WorkerView("w", "node", "cuda", (0,), 80 * GB, 0), 0, 0)
    for work in members:
        found.take(work, 0)
    return found


def always(requests_per_s: float) -> Work:
    """A model that fills a fifth of a GPU, whatever it is asked for."""
    return Work(compute=0.2, activity=0.2, tightness=0.2, requests_per_s=requests_per_s)


def test_the_share_falls_from_all_with_pressure_and_with_queues() -> None:
    assert kept_share(0.0) == 1.0
    steps = [kept_share(pressure / 20) for pressure in range(80)]
    assert all(0.0 < after <= before for before, after in pairwise(steps))
    assert kept_share(0.9, queued=0) > kept_share(0.9, queued=2) > kept_share(0.9, queued=20)
    assert kept_share(float("inf")) == 0.0


def test_on_a_quiet_gpu_everybody_is_worth_having() -> None:
    place = Place(gpu().worker, (gpu(always(1.0), always(1.0)),))
    assert gain_of(place, always(0.1), 0) > 0.09


def test_on_a_full_one_only_who_brings_more_than_the_others_lose() -> None:
    full = [always(1.0)] * 6
    place = Place(gpu().worker, (gpu(*full),))
    assert gain_of(place, always(0.1), 0) < 0 < gain_of(place, always(3.0), 0)


@given(st.lists(works, max_size=6), works)
def test_looking_leaves_everything_as_it_was(members: list[Work], one: Work) -> None:
    found = gpu(*members)
    before = (found.pressure, found.requests_per_s, found.kv_space)
    gain_of(Place(found.worker, (found,)), one, GB)
    assert (found.pressure, found.requests_per_s, found.kv_space) == before


@given(st.lists(works, max_size=6), works)
def test_what_it_gains_is_the_difference_once_it_is_there(members: list[Work], one: Work) -> None:
    before, after = gpu(*members), gpu(*members, one)
    gained = gain_of(Place(before.worker, (before,)), one, 0)
    assert gained == pytest.approx(kept_per_s(after) - kept_per_s(before), abs=1e-9)


def hot(name: str, rate: float) -> ModelView:
    """A model that decodes all the time and whose promise is just kept beside four others."""
    found = view(name, 8, tpot_slo_ms=40.0, ttft_slo_ms=2000.0)
    return msgspec.structs.replace(found, traffic=traffic(rate, 100.0, max(200.0, 60.0 / rate), 0.1))


def crowded(rates: dict[str, float], **policy: float) -> Cluster:
    names = list(rates)
    it = cluster(
        [hot(name, rate) for name, rate in rates.items()],
        gpus=1,
        policy=BalancedPlacement(replicate_above=1e9, **policy),  # type: ignore[arg-type]
        limit=400 * GB,
    )
    for name in names:
        active(it, name, "w0", idle_s=0.0)
    it.running = set(names)
    return it


class TestWithholding:
    def seven(self) -> Cluster:
        it = crowded({f"m{place}": 0.5 for place in range(7)})
        it.views["tail"] = hot("tail", 0.02)
        it.held["w0", "tail"] = Held(ModelState.DOZING, (0,))
        return it

    def test_a_model_that_few_ask_for_waits_where_there_is_too_much_work(self) -> None:
        it = self.seven()
        board = Board(it.snapshot(), it.now)
        board.measure()
        assert board.gpus[0].pressure > 1.0
        it.ask(["tail"])
        assert told(it) == []
        (note,) = [note for note in it.policy.plan(it.snapshot(), it.now).notes if note.model == "tail"]
        assert note.text.startswith("waits: of")

    def test_but_not_for_longer_than_patience(self) -> None:
        it = self.seven()
        it.ask(["tail"])
        it.now += BalancedPlacement().patience_s + 0.5
        assert ("Activate", "tail", "w0") in told(it)

    def test_one_of_a_higher_priority_does_not_wait(self) -> None:
        it = self.seven()
        tail = it.views["tail"]
        it.views["tail"] = msgspec.structs.replace(tail, spec=msgspec.structs.replace(tail.spec, priority=1))
        it.ask(["tail"])
        assert told(it) == [("Activate", "tail", "w0")]

    def test_nor_does_one_that_many_ask_for(self) -> None:
        it = self.seven()
        it.views["tail"] = hot("tail", 3.0)
        it.ask(["tail"])
        assert told(it) == [("Activate", "tail", "w0")]


class TestShedding:
    def test_where_requests_wait_the_model_sleeps_that_fewest_ask_for(self) -> None:
        rates = {f"m{place}": 2.0 for place in range(7)} | {"tail": 0.05}
        it = crowded(rates, shed_queued=0)
        assert ("Doze", "tail", "w0") in told(it)

    def test_not_while_nothing_waits(self) -> None:
        it = crowded({f"m{place}": 2.0 for place in range(7)} | {"tail": 0.05})
        assert told(it) == []

    def test_without_it_the_others_keep_more_promises(self) -> None:
        it = crowded({f"m{place}": 2.0 for place in range(7)} | {"tail": 0.05})
        board = Board(it.snapshot(), it.now)
        board.measure()
        gains = {one.model: gain_without(one) for one in board.gpus[0].instances}
        assert max(gains, key=lambda name: gains[name]) == "tail"
        assert gains["tail"] > 0
