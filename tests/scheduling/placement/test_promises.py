"""What every policy that places on demand promises, whatever is asked for, with tensor parallelism and
commands in flight: memory is never exceeded, the same snapshot gives the same plan, all comes to rest."""

from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scheduling.placement.carrying_out import GB, Cluster, Held, traffic

from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec, ModelState, Tier
from prism.scheduling.placement import policies
from prism.scheduling.placement.actions import Doze
from prism.scheduling.placement.snapshot import ModelView

pytestmark = pytest.mark.core

POLICIES = ["balanced", "kvpr", "memory_per_request"]
NAMES = "abcdefg"


def view(name: str, billions: float, rate: float = 0.0, **spec: Any) -> ModelView:
    """A model of so many billion parameters in bfloat16, with 128 KiB of KV cache a token."""
    facts = ModelFacts(
        name,
        parameters=int(billions * GB),
        kv_elements_per_token=65536,
        context_length=8192,
        checkpoint_dtype="bfloat16",
    )
    return ModelView(ModelSpec(name, f"/{name}", **spec), facts, traffic=traffic(rate))


Drawn = tuple[dict[str, ModelView], dict[str, tuple[int, ...]], tuple[bool, bool]]


@st.composite
def clusters(draw: st.DrawFn) -> Drawn:
    views = {}
    for name in NAMES:
        tp_size = draw(st.sampled_from([1, 1, 1, 2]))
        first = draw(st.integers(0, 2)) * tp_size
        homes = [InitialPlacement(list(range(first, first + tp_size)), draw(st.booleans()))]
        views[name] = view(
            name,
            draw(st.sampled_from([1, 3, 8, 14, 30])),
            draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0])),
            tp_size=tp_size,
            init_placements=homes if draw(st.booleans()) else [],
            pin=draw(st.integers(0, 6)) == 0,
            priority=draw(st.integers(0, 1)),
            minimum_tier=draw(st.sampled_from([Tier.COLD, Tier.COLD, Tier.DOZING, Tier.ACTIVE])),
            replicas=draw(st.sampled_from([1, 1, 1, 2])),
            ttft_slo_ms=draw(st.sampled_from([None, 300.0, 2000.0])),
            tpot_slo_ms=draw(st.sampled_from([None, 30.0, 100.0])),
        )
    shape = draw(st.sampled_from([(1,), (1, 1), (2,), (2, 1), (4,), (2, 2)]))
    workers, first = {}, 0
    for number, gpus in enumerate(shape):
        workers[f"w{number}"] = tuple(range(first, first + gpus))
        first += gpus
    return views, workers, (draw(st.booleans()), draw(st.booleans()))


names = st.sets(st.sampled_from(NAMES), max_size=3)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(clusters(), st.lists(st.tuples(names, names), max_size=25))
def test_memory_is_never_exceeded_and_everything_comes_to_rest(
    policy: str,
    drawn: Drawn,
    events: list[tuple[set[str], set[str]]],
) -> None:
    views, workers, kind = drawn
    it = Cluster(policies[policy](), views, workers, elastic=kind[0], freezes=kind[1])
    for asked, toggled in events:
        it.ask(asked)
        it.running ^= toggled
        it.running &= {name for name in NAMES if it.active(name)}
        it.step()
    it.running.clear()
    it.settle(steps=800, quiet=140)
    before = len(it.log)
    for _ in range(10):
        it.step()
    assert len(it.log) == before, "without change it stays as it is"


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(clusters(), st.integers(2, 60))
def test_a_move_never_takes_a_models_last_instance_while_it_has_requests(
    policy: str,
    drawn: Drawn,
    steps: int,
) -> None:
    views, workers, kind = drawn
    it = Cluster(policies[policy](), views, workers, elastic=kind[0], freezes=kind[1])
    it.ask(NAMES[:4])
    for _ in range(20):
        it.step()
    it.parked.clear()
    for _ in range(steps):
        it.running = {name for name in NAMES if it.active(name)}
        before = {name: len(it.active(name)) for name in NAMES}
        gone = Counter(action.model for action in it.step() if isinstance(action, Doze))
        # Nobody waits for anything, so that whatever sleeps does so for balance alone.
        for name, count in gone.items():
            assert before[name] - count >= 1
        it.parked.clear()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15)
@given(clusters())
def test_with_steady_traffic_plans_are_stable(policy: str, drawn: Drawn) -> None:
    views, workers, kind = drawn
    it = Cluster(policies[policy](), views, workers, elastic=kind[0], freezes=kind[1])
    it.ask(NAMES)
    for _ in range(40):
        it.step()
    it.parked.clear()
    it.running = {name for name in NAMES if it.active(name)}
    it.settle(steps=300, quiet=100)


@pytest.mark.parametrize("policy", sorted(policies))
def test_a_model_that_serves_while_its_facts_are_not_known_is_left_where_it_is(policy: str) -> None:
    it = Cluster(policies[policy](), {name: view(name, 8, 5.0) for name in "ab"}, {"v": (0,), "w": (1,)})
    it.ask("ab")
    it.settle()
    it.now += 60.0
    it.running = {"a", "b"}
    snapshot = it.snapshot()
    models = {**snapshot.models, "a": msgspec.structs.replace(snapshot.models["a"], facts=None)}
    plan = it.policy.plan(msgspec.structs.replace(snapshot, models=models), it.now)
    assert not [action for action in plan.actions if action.model == "a"]


@pytest.mark.parametrize("policy", sorted(policies))
def test_removed_models_are_released_in_the_order_in_which_the_worker_names_them(policy: str) -> None:
    views = {f"m{number}": view(f"m{number}", 1) for number in range(12)}
    it = Cluster(policies[policy](), views, {"w": (0,)})
    it.held = {("w", name): Held(ModelState.DOZING, (0,)) for name in views}
    snapshot = it.snapshot()
    removed = {name: msgspec.structs.replace(known, removed=True) for name, known in snapshot.models.items()}
    plan = it.policy.plan(msgspec.structs.replace(snapshot, models=removed), it.now)
    assert [action.model for action in plan.actions] == list(views)
