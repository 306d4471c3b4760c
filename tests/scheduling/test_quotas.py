"""KV memory between engines: promises never exceed the pool, and memory goes where it is wanted."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.quotas import QuotaHolder, QuotaPlan, arbitrate

pytestmark = pytest.mark.core


def holder(
    model: str,
    quota: int,
    *,
    used: int = 0,
    committed: int = 0,
    wanted: int = 0,
    floor: int = 0,
    cap: int = 10**6,
    granularity: int = 1,
    priority: int = 0,
) -> QuotaHolder:
    return QuotaHolder(model, quota, used, committed, wanted, floor, cap, granularity, priority)


def test_idle_memory_goes_to_who_wants_it_once_it_is_free() -> None:
    hot, idle = holder("hot", 50, used=50, committed=50, wanted=80), holder("idle", 50, floor=10)
    plan = arbitrate(100, [hot, idle])
    assert plan == QuotaPlan({"hot": 80, "idle": 20}, {"idle": 20}, {})
    confirmed = [hot, msgspec.structs.replace(idle, quota_bytes=20)]
    assert arbitrate(100, confirmed).grow == {"hot": 80}


def test_a_shrink_that_was_confirmed_in_part_makes_that_part_of_the_room() -> None:
    hot = holder("hot", 50, used=50, committed=50, wanted=80)
    plan = arbitrate(100, [hot, holder("slow", 35, used=35, floor=10)])
    assert plan.grow == {"hot": 65}
    assert plan.shrink == {}


def test_nothing_is_taken_that_nobody_wants() -> None:
    assert arbitrate(100, [holder("a", 70), holder("b", 30, used=10, committed=20, wanted=30)]) == QuotaPlan(
        {"a": 70, "b": 30}, {}, {}
    )


def test_who_grows_gets_room_to_grow_if_nobody_else_wants_it() -> None:
    assert arbitrate(1000, [holder("a", 10, wanted=400), holder("b", 100)]).grow == {"a": 500}
    assert arbitrate(540, [holder("a", 10, wanted=400), holder("b", 100)]).grow == {"a": 440}


def test_floors_and_caps_hold() -> None:
    plan = arbitrate(100, [holder("hot", 50, wanted=500, cap=70), holder("idle", 50, floor=40)])
    assert plan.targets == {"hot": 60, "idle": 40}
    assert arbitrate(200, [holder("hot", 50, wanted=500, cap=70)]).targets == {"hot": 70}


def test_equals_share_what_is_scarce() -> None:
    plan = arbitrate(
        90, [holder("a", 45, wanted=20), holder("b", 45, wanted=200), holder("c", 0, wanted=200)]
    )
    assert plan.targets == {"a": 20, "b": 35, "c": 35}


def test_an_equal_does_not_push_out_what_runs() -> None:
    plan = arbitrate(100, [holder("a", 90, used=60, committed=80, wanted=200), holder("b", 10, wanted=200)])
    assert plan.shrink == {"a": 80}


def test_a_higher_priority_does() -> None:
    low = holder("low", 90, used=60, committed=80, wanted=80, floor=10)
    plan = arbitrate(100, [low, holder("high", 10, wanted=200, priority=1)])
    assert plan.shrink == {"low": 10}


def test_a_smaller_pool_shrinks_idle_memory_and_grows_nobody() -> None:
    busy = holder("busy", 50, used=40, committed=45, wanted=90)
    assert arbitrate(70, [busy, holder("idle", 50, floor=5)]) == QuotaPlan(
        {"busy": 65, "idle": 5}, {"idle": 5}, {}
    )


def test_quotas_are_whole_pages() -> None:
    plan = arbitrate(100, [holder("hot", 16, wanted=41, granularity=8), holder("idle", 80, granularity=16)])
    assert plan.targets == {"hot": 48, "idle": 48}


def test_what_it_could_give_away() -> None:
    assert holder("a", 100, used=30, committed=40, floor=20, granularity=16).spare_bytes == 52
    assert holder("a", 100, used=30, committed=140).spare_bytes == 0


sizes = st.integers(0, 300)
holders = st.builds(
    lambda quota, used, committed, queued, floor, room, granularity, priority: QuotaHolder(
        "",
        quota,
        used,
        max(used, committed),
        max(used, committed) + queued,
        floor,
        floor + room,
        granularity,
        priority,
    ),
    sizes,
    sizes,
    sizes,
    sizes,
    st.integers(0, 40),
    sizes,
    st.sampled_from([1, 7, 16]),
    st.integers(0, 2),
)
groups = st.lists(holders, max_size=6).map(
    lambda drawn: [msgspec.structs.replace(each, model=f"m{i}") for i, each in enumerate(drawn)]
)


def carried_out(
    pool: int, group: list[QuotaHolder], chance: random.Random | None = None
) -> list[QuotaHolder]:
    """The holders after one plan; with `chance`, shrinks are confirmed late, or in part."""
    plan = arbitrate(pool, group)
    assert not plan.shrink.keys() & plan.grow.keys()
    after = []
    for each in group:
        quota = plan.grow.get(each.model, each.quota_bytes)
        if each.model in plan.shrink:
            lowest = plan.shrink[each.model]
            quota = lowest if chance is None else chance.randint(lowest, each.quota_bytes)
        after.append(msgspec.structs.replace(each, quota_bytes=quota))
    raised = sum(plan.grow.values()) - sum(each.quota_bytes for each in group if each.model in plan.grow)
    before = sum(each.quota_bytes for each in group)
    assert before + raised <= pool or not plan.grow, "grows need no shrink to be carried out"
    return after


@given(groups, sizes.map(lambda size: size * 4), st.randoms())
def test_promises_never_exceed_the_pool_and_settle(
    group: list[QuotaHolder], pool: int, chance: random.Random
) -> None:
    promised = sum(each.quota_bytes for each in group)
    for _ in range(60):
        group = carried_out(pool, group, chance)
        now_promised = sum(each.quota_bytes for each in group)
        assert now_promised <= max(pool, promised)
        promised = now_promised
    assert promised <= pool
    for _ in range(3):
        group = carried_out(pool, group)
    settled = arbitrate(pool, group)
    assert (settled.shrink, settled.grow) == ({}, {}), "nothing changes when nothing changes"


@given(groups, sizes.map(lambda size: size * 4))
def test_targets_keep_within_bounds(group: list[QuotaHolder], pool: int) -> None:
    targets = arbitrate(pool, group).targets
    assert sum(targets.values()) <= pool
    enough_for_floors = sum(each.floor_bytes + each.granularity for each in group) <= pool
    for each in group:
        assert targets[each.model] <= max(each.cap_bytes, 0)
        if enough_for_floors:
            assert targets[each.model] > each.floor_bytes - each.granularity


@given(groups, sizes.map(lambda size: size * 4))
def test_memory_is_idle_only_when_nobody_wants_it(group: list[QuotaHolder], pool: int) -> None:
    targets = arbitrate(pool, group).targets
    wanting = [
        each
        for each in group
        if targets[each.model] + each.granularity <= min(each.wanted_bytes, each.cap_bytes)
    ]
    if wanting:
        rounding = sum(each.granularity for each in group)
        for each in group:
            others = [other for other in wanting if other.priority >= each.priority]
            surplus = targets[each.model] - max(each.needed_bytes, each.wanted_bytes)
            assert not others or surplus <= each.granularity
        assert pool - sum(targets.values()) <= rounding


@given(groups, sizes.map(lambda size: size * 4), st.randoms())
def test_the_order_of_the_holders_makes_no_difference(
    group: list[QuotaHolder], pool: int, chance: random.Random
) -> None:
    shuffled = list(group)
    chance.shuffle(shuffled)
    assert arbitrate(pool, shuffled) == arbitrate(pool, group)
