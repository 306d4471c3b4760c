"""How much engines that compute on one GPU slow each other, against the tightest objective."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.placement.pressure import Company, Work

pytestmark = pytest.mark.core

works = st.builds(
    Work,
    activity=st.floats(0.0, 1.0),
    tightness=st.floats(0.0, 2.0),
    compute=st.just(0.0),
    kv_bytes=st.just(0.0),
)


def of(*members: Work) -> Company:
    company = Company()
    for work in members:
        company.join(work)
    return company


def expected(members: list[Work]) -> float:
    """The definition: of the one with the tightest objective, with all others' shares beside it."""
    working = [work for work in members if work.activity > 0.0]
    if not working:
        return 0.0
    tightest = max(working, key=lambda work: (work.tightness, work.activity))
    return tightest.tightness * (1.0 + sum(work.activity for work in working) - tightest.activity)


def test_alone_it_takes_what_it_takes() -> None:
    assert of(Work(activity=1.0, tightness=0.2)).strain == pytest.approx(0.2)


def test_beside_four_that_always_compute_it_takes_five_times_as_long() -> None:
    always = Work(activity=1.0, tightness=0.2)
    assert of(*[always] * 5).strain == pytest.approx(1.0)


def test_the_tightest_objective_counts() -> None:
    easy, tight = Work(activity=0.5, tightness=0.1), Work(activity=0.1, tightness=0.8)
    assert of(easy, tight).strain == pytest.approx(0.8 * 1.5)


def test_who_never_computes_is_in_nobody_s_way() -> None:
    assert of(Work(activity=0.5, tightness=0.4), Work(activity=0.0, tightness=5.0)).strain == pytest.approx(
        0.4
    )


@given(st.lists(works, max_size=6), works)
def test_it_is_the_same_however_it_is_asked(members: list[Work], one: Work) -> None:
    company = of(*members)
    before = expected(members)
    assert company.strain == pytest.approx(before, abs=1e-9)
    if one.activity > 0.0:
        assert company.strain_with(one) == pytest.approx(expected([*members, one]), abs=1e-9)
    company.join(one)
    assert company.strain == pytest.approx(expected([*members, one]), abs=1e-9)
    assert company.strain_without(one) == pytest.approx(before, abs=1e-9)
    company.leave(one)
    assert company.strain == pytest.approx(before, abs=1e-9)


def test_each_more_makes_it_worse() -> None:
    work = Work(activity=0.3, tightness=0.2)
    strains = [of(*[work] * count).strain for count in range(1, 8)]
    assert all(after > before for before, after in pairwise(strains))
