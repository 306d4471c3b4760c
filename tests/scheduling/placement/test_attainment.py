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
from prism.scheduling.placement.attainment import gain_of, kept_per_s, kept_share
from prism.scheduling.placement.balanced import BalancedPlacement
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Gpu, Place
from prism.scheduling.placement.pressure import Work
from prism.scheduling.placement.prospects import Manners
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import Demand, ModelView, WorkerView
from prism.scheduling.placement.wants import wanted_models

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


def test_those_with_whom_it_takes_turns_are_served_as_before() -> None:
    it = cluster([view("asleep", 14, 1.0), view("here", 14, 1.0)], gpus=1)
    active(it, "here", "w0")
    board = Board(it.snapshot(), it.now)
    board.measure()
    place, (instance,) = board.places["w0"], board.serving["here"]
    brings = always(1.0)
    lost, kept = gain_of(place, brings, GB, [instance]), gain_of(place, brings, GB, (), [instance])
    assert kept == pytest.approx(1.0, abs=0.05)
    assert lost == pytest.approx(0.0, abs=0.05)


def test_what_others_lose_counts_on_every_gpu_that_they_are_on() -> None:
    it = cluster([view("wide", 14, 1.0, tp_size=2)], workers={"w": (0, 1)})
    active(it, "wide", "w")
    board = Board(it.snapshot(), it.now)
    board.measure()
    (instance,) = board.serving["wide"]
    half = Place(instance.place.worker, instance.place.gpus[:1])
    lost = -gain_of(half, Work(), 0, [instance])
    assert lost == pytest.approx(sum(map(kept_per_s, board.gpus)))
    assert lost > 1.5 * kept_per_s(board.gpus[0])


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


def patience_s(billions: float, rate: float) -> float:
    """How long a sleeping model of that size waits on a GPU that a busy one of 30 billion parameters fills,
    which gets one request a second."""
    it = cluster([hot("busy", 1.0)], gpus=1)
    active(it, "busy", "w0", idle_s=0.0)
    it.running = {"busy"}
    asked = view("asked", billions, tpot_slo_ms=40.0, ttft_slo_ms=2000.0)
    it.views["asked"] = msgspec.structs.replace(asked, traffic=traffic(rate, 100.0, 100.0, 0.1))
    it.ask(["asked"])
    snapshot = it.snapshot()
    board = Board(snapshot, it.now)
    board.measure()
    policy = BalancedPlacement()
    manners = Manners(
        policy.patience_s, 5.0, 60.0, 0.5, policy.promised_patience_s, policy.longest_patience_s
    )
    reconciler = Reconciler(snapshot, board, manners)
    (wanted,) = wanted_models(snapshot)[0]
    place = board.places["w0"]
    return reconciler.patience_s(wanted, place, board.need_at(wanted.view, place))


class TestPatience:
    def test_the_more_requests_the_memory_serves_for_each_that_it_brings_the_longer(self) -> None:
        assert patience_s(3, 1.0) < patience_s(14, 1.0) < patience_s(14, 0.5)

    def test_within_its_bounds(self) -> None:
        policy = BalancedPlacement()
        assert patience_s(1, 50.0) == policy.patience_s
        assert patience_s(30, 0.001) == policy.longest_patience_s


class TestTurns:
    """Models that don't fit into a GPU's memory together."""

    def pair(self, ttft_slo_ms: float | None, busy_rate: float = 0.1) -> Cluster:
        def of(name: str, billions: float, rate: float) -> ModelView:
            found = view(name, billions, ttft_slo_ms=ttft_slo_ms, tpot_slo_ms=100.0)
            return msgspec.structs.replace(found, traffic=traffic(rate, 100.0, 100.0, 1.0))

        it = cluster([of("here", 14, 1.0), of("asked", 14, 1.0), of("busy", 14, busy_rate)], gpus=1)
        active(it, "here", "w0", idle_s=1.0)
        active(it, "busy", "w0", idle_s=0.0)
        it.running = {"busy"}
        it.held["w0", "asked"] = Held(ModelState.DOZING, (0,))
        it.ask(["asked"])
        return it

    def test_one_that_can_be_back_in_time_makes_room_at_once(self) -> None:
        assert told(self.pair(ttft_slo_ms=2000.0)) == [("Doze", "here", "w0")]

    def test_one_that_can_not_is_spared_while_it_only_pauses(self) -> None:
        assert told(self.pair(ttft_slo_ms=200.0)) == []

    def test_nor_where_nobody_knows_how_soon_it_would_be(self) -> None:
        it = self.pair(ttft_slo_ms=2000.0)
        it.profile = None
        assert told(it) == []

    def test_after_patience_it_is_one_that_only_pauses_and_not_one_that_works(self) -> None:
        it = self.pair(ttft_slo_ms=200.0)
        it.held["w0", "busy"].since = it.now - 500.0
        it.now += BalancedPlacement().longest_patience_s + 0.5
        it.held["w0", "here"].used = it.now - 1.0
        assert told(it) == [("Doze", "here", "w0")]

    def test_nobody_takes_turns_where_there_is_more_work_than_time(self) -> None:
        it = self.pair(ttft_slo_ms=2000.0, busy_rate=40.0)
        assert told(it) == []
        (note,) = [note for note in it.policy.plan(it.snapshot(), it.now).notes if note.model == "asked"]
        assert "waits" in note.text


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

    def test_nobody_waits_where_there_is_time(self) -> None:
        for withhold_above, expected in ((0.0, []), (0.7, [("Activate", "tail", "w0")])):
            it = crowded({"a": 0.5}, least_gain=1e9, withhold_above=withhold_above)
            it.views["tail"] = hot("tail", 0.02)
            it.held["w0", "tail"] = Held(ModelState.DOZING, (0,))
            it.ask(["tail"])
            assert told(it) == expected

    def test_but_not_for_longer_than_patience(self) -> None:
        it = self.seven()
        it.ask(["tail"])
        it.now += BalancedPlacement().longest_patience_s + 0.5
        assert ("Activate", "tail", "w0") in told(it)

    @pytest.mark.parametrize("unpromised", ["tail", "m3"])
    def test_nor_where_one_of_them_is_promised_nothing(self, unpromised: str) -> None:
        it = self.seven()
        view = it.views[unpromised]
        spec = msgspec.structs.replace(view.spec, ttft_slo_ms=None, tpot_slo_ms=None)
        it.views[unpromised] = msgspec.structs.replace(view, spec=spec)
        it.ask(["tail"])
        assert told(it) == [("Activate", "tail", "w0")]

    def test_one_of_a_higher_priority_does_not_wait(self) -> None:
        it = self.seven()
        tail = it.views["tail"]
        it.views["tail"] = msgspec.structs.replace(tail, spec=msgspec.structs.replace(tail.spec, priority=1))
        it.ask(["tail"])
        assert told(it) == [("Activate", "tail", "w0")]

    def test_clients_that_give_up_and_ask_again_have_waited_all_the_same(self) -> None:
        it = self.seven()
        it.ask(["tail"])
        snapshot = it.snapshot()
        waited_s = BalancedPlacement().longest_patience_s + 0.5
        for parked_for_s, expected in ((0.0, 0), (waited_s, 1)):
            demand = {"tail": Demand(1, 0.5, parked_for_s)}
            plan = it.policy.plan(msgspec.structs.replace(snapshot, demand=demand), it.now)
            assert len([one for one in plan.actions if one.model == "tail"]) == expected

    def test_a_model_that_is_too_much_for_a_gpu_has_an_empty_one_all_the_same(self) -> None:
        alone = hot("alone", 1.0)
        alone = msgspec.structs.replace(alone, traffic=traffic(60.0, 3000.0, 500.0, 0.1))
        it = cluster([alone], gpus=1, policy=BalancedPlacement(replicate_above=1e9))
        it.held["w0", "alone"] = Held(ModelState.DOZING, (0,))
        it.ask(["alone"])
        assert told(it) == [("Activate", "alone", "w0")]

    def test_nor_does_one_that_many_ask_for(self) -> None:
        it = self.seven()
        it.views["tail"] = hot("tail", 3.0)
        it.ask(["tail"])
        assert told(it) == [("Activate", "tail", "w0")]
