"""The LRU policy over time: a small cluster carries out its plans, and promises are watched throughout."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec, ModelState, Tier
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement.actions import Action, Activate, Doze
from prism.scheduling.placement.lru import LruPlacement
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    InFlight,
    ModelView,
    ResidentModel,
    WorkerView,
)

pytestmark = pytest.mark.core

LIMIT = 100
KV = 10
STEP_S = 0.25
WAKE_S = 0.5


@dataclass
class Model:
    view: ModelView
    state: ModelState = ModelState.COLD
    held: int = 0
    since: float = 0.0
    used: float = 0.0
    parked_since: float | None = None
    running: bool = False
    worker: str = ""
    ends: float = 0.0


@dataclass
class Cluster:
    """Workers that carry out commands after a while and keep a ledger; time moves in steps."""

    models: dict[str, Model]
    workers: list[str]
    policy: LruPlacement = field(default_factory=LruPlacement)
    now: float = 0.0
    commands: dict[tuple[str, str], Action] = field(default_factory=dict)
    log: list[Action] = field(default_factory=list)

    def reserved(self, worker: str) -> int:
        return sum(model.held for model in self.models.values() if model.worker == worker)

    def snapshot(self) -> ClusterSnapshot:
        def resident(model: Model) -> ResidentModel:
            weights = max(0, model.held - KV)
            return ResidentModel(
                state=model.state,
                running=int(model.running),
                weights_bytes=weights,
                kv_quota_bytes=model.held - weights,
                idle_s=0.0 if model.running else self.now - model.used,
                state_s=self.now - model.since,
            )

        workers = tuple(
            WorkerView(
                id,
                "node",
                "cpu",
                (number,),
                LIMIT,
                self.reserved(id),
                element_bytes=1,
                models={n: resident(m) for n, m in self.models.items() if m.worker == id},
            )
            for number, id in enumerate(self.workers)
        )
        demand = {
            name: Demand(1, self.now - model.parked_since)
            for name, model in self.models.items()
            if model.parked_since is not None
        }
        flying = tuple(
            InFlight(worker, name, CommandKind.ACTIVATE, action.footprint_bytes)
            if isinstance(action, Activate)
            else InFlight(worker, name, CommandKind.DOZE)
            for (worker, name), action in self.commands.items()
        )
        return ClusterSnapshot(workers, {n: m.view for n, m in self.models.items()}, demand, flying)

    def step(self) -> list[Action]:
        self.now += STEP_S
        self._finish()
        snapshot = self.snapshot()
        plan = self.policy.plan(snapshot, self.now)
        assert plan == self.policy.plan(snapshot, self.now), "the same snapshot gives the same plan"
        for action in plan.actions:
            self._begin(action)
        assert not self.policy.plan(self.snapshot(), self.now).actions, (
            "a plan under way is not planned again"
        )
        return list(plan.actions)

    def _begin(self, action: Action) -> None:
        key = (action.worker, action.model)
        assert key not in self.commands, "one command at a time for a model on a worker"
        self.commands[key] = action
        self.log.append(action)
        model = self.models[action.model]
        if isinstance(action, Activate):
            assert model.state in (ModelState.COLD, ModelState.DOZING)
            assert model.view.facts is not None
            model.worker, model.held = action.worker, action.footprint_bytes
            assert model.held == model.view.facts.parameters + action.kv_bytes
            assert self.reserved(action.worker) <= LIMIT, "an activation is only planned where it fits now"
            model.state, model.ends = ModelState.STARTING, self.now + WAKE_S
        else:
            assert isinstance(action, Doze)
            assert model.state is ModelState.ACTIVE
            assert not model.view.spec.pin, "pinned models stay"
            assert model.view.spec.minimum_tier is not Tier.ACTIVE
            model.state, model.ends = ModelState.DRAINING, self.now + STEP_S
        model.since = self.now

    def _finish(self) -> None:
        for (worker, name), action in list(self.commands.items()):
            model = self.models[name]
            if self.now < model.ends:
                continue
            del self.commands[worker, name]
            model.since = self.now
            if isinstance(action, Activate):
                model.state, model.used, model.parked_since = ModelState.ACTIVE, self.now, None
                model.view = ModelView(model.view.spec, model.view.facts, started=True)
            else:
                model.state, model.held, model.running = ModelState.DOZING, 0, False

    def ask(self, name: str) -> None:
        """A request arrives: served if the model is active, else parked."""
        model = self.models[name]
        model.used = self.now
        if model.state is not ModelState.ACTIVE and model.parked_since is None:
            model.parked_since = self.now


def cluster(
    sizes: dict[str, int], workers: int = 1, spec: Callable[[str], ModelSpec] | None = None
) -> Cluster:
    def view(name: str, size: int) -> ModelView:
        facts = ModelFacts(name, parameters=size - KV, kv_elements_per_token=1, context_length=KV // 2)
        return ModelView(spec(name) if spec else ModelSpec(name, f"/{name}"), facts)

    models = {name: Model(view(name, size)) for name, size in sizes.items()}
    return Cluster(models, [f"w{number}" for number in range(workers)])


def test_a_third_model_does_not_starve_beside_two_with_continuous_traffic() -> None:
    it = cluster({"a": 50, "b": 50, "c": 50})
    served = dict.fromkeys("abc", 0)
    longest = 0.0
    while it.now < 120:
        for name, model in it.models.items():
            it.ask(name)
            model.running = model.state is ModelState.ACTIVE
            served[name] += model.running
            longest = max(longest, it.now - (it.now if model.parked_since is None else model.parked_since))
        it.step()
    assert longest < 8, "min_active_s, a drain and a wake at most"
    assert min(served.values()) > 0.5 * max(served.values())
    dozes = [action for action in it.log if isinstance(action, Doze)]
    assert len(dozes) < 120 / 2, "each stays for a while before it must go"


def test_a_large_model_gets_its_turn_among_small_ones() -> None:
    it = cluster({"big": 100, "a": 40, "b": 40, "c": 40})
    turns = 0
    while it.now < 60:
        for name, model in it.models.items():
            it.ask(name)
            model.running = model.state is ModelState.ACTIVE
        turns += sum(isinstance(action, Activate) and action.model == "big" for action in it.step())
    assert turns >= 3


def test_two_idle_models_that_fit_together_never_move() -> None:
    it = cluster({"a": 50, "b": 50})
    for _ in range(200):
        it.ask("a")
        it.ask("b")
        it.step()
    assert [type(action) for action in it.log] == [Activate, Activate]


names = st.sampled_from("abcdef")


@st.composite
def specs(draw: st.DrawFn) -> dict[str, ModelSpec]:
    def one(name: str) -> ModelSpec:
        on = draw(st.booleans())
        return ModelSpec(
            name,
            f"/{name}",
            init_placements=[InitialPlacement([draw(st.integers(0, 2))], on)] if draw(st.booleans()) else [],
            pin=draw(st.integers(0, 5)) == 0,
            priority=draw(st.integers(0, 2)),
            minimum_tier=draw(st.sampled_from([Tier.COLD, Tier.DOZING, Tier.ACTIVE])),
            idle_timeout_s=draw(st.sampled_from([None, 1.0, 10.0])),
        )

    return {name: one(name) for name in "abcdef"}


@settings(max_examples=150)
@given(
    specs(),
    st.lists(st.integers(20, 110), min_size=6, max_size=6),
    st.integers(1, 3),
    st.lists(st.tuples(st.sets(names, max_size=3), st.sets(names, max_size=3)), max_size=40),
)
def test_promises_hold_whatever_is_asked_for(
    models: dict[str, ModelSpec], sizes: list[int], workers: int, events: list[tuple[set[str], set[str]]]
) -> None:
    it = cluster(dict(zip("abcdef", sizes, strict=True)), workers, models.__getitem__)
    for asked, toggled in events:
        for name in asked:
            it.ask(name)
        for name in toggled:
            model = it.models[name]
            model.running = model.state is ModelState.ACTIVE and not model.running
            model.used = it.now
        it.step()
    for model in it.models.values():
        model.running = False
    for _ in range(120):
        it.step()
    assert not it.commands, "without further events everything comes to rest"
    assert not it.step()
    evictable = all(
        not spec.pin and spec.minimum_tier is not Tier.ACTIVE and not spec.idle_timeout_s
        for spec in models.values()
    )
    for model in it.models.values():
        if evictable and model.view.facts and model.view.facts.parameters + KV <= LIMIT:
            assert model.parked_since is None, "whatever can be served is served in the end"
