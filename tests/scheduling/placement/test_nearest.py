"""Which places of a large cluster are looked at: those of least rank, however ranks rise meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.placement.gpus import Gpu, Place
from prism.scheduling.placement.nearest import Front, places_within
from prism.scheduling.placement.snapshot import WorkerView

pytestmark = pytest.mark.core


def cluster(workers: int, gpus: int = 1) -> list[Place]:
    """Workers of so many GPUs each, without models."""
    views = [
        WorkerView(f"w{at}", "node", "cuda", tuple(range(at * gpus, (at + 1) * gpus)), 100, 0)
        for at in range(workers)
    ]
    return [Place(view, tuple(Gpu(view, gpu_id, 0) for gpu_id in view.gpu_ids)) for view in views]


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 39), st.floats(0.01, 5), st.integers(0, 2)), max_size=30),
)
def test_those_of_least_rank_come_first_while_ranks_only_rise(
    ranks: list[float], rises: list[tuple[int, float, int]]
) -> None:
    places = cluster(len(ranks))
    rank = {place.gpus[0].id: value for place, value in zip(places, ranks, strict=True)}
    front = Front(places, lambda gpu: rank[gpu.id])
    for at, rise, fit_of_three in [(0, 0.0, 2), *rises]:
        rank[at % len(places)] += rise

        def fits(place: Place, least: int = fit_of_three) -> bool:
            return place.gpus[0].id % 3 <= least

        found = front.nearest(fits, enough=4, unfit=2, most=10)
        order = sorted(places, key=lambda place: rank[place.gpus[0].id])[:10]
        fitting = sorted(rank[place.gpus[0].id] for place in found if fits(place))
        least = [rank[place.gpus[0].id] for place in order if fits(place)][:4]
        # Equal ranks at the end of what is looked at may leave out either place.
        assert fitting == least or len({rank[place.gpus[0].id] for place in places}) < len(places)
        assert len(found) - len(fitting) <= 2


def test_groups_of_gpus_are_aligned_so_that_none_is_left_over_and_the_least_pressed_are_among_them() -> None:
    (whole,) = cluster(1, gpus=4)
    pressed = {0: 1.0, 1: 9.0, 2: 8.0, 3: 2.0}
    groups = places_within(whole, 2, lambda gpu: pressed[gpu.id])
    assert [tuple(gpu.id for gpu in place.gpus) for place in groups] == [(0, 1), (2, 3), (0, 3)]


def test_a_worker_with_too_few_gpus_has_no_place() -> None:
    (whole,) = cluster(1, gpus=2)
    assert places_within(whole, 4, lambda gpu: 0.0) == []
