"""Which images leave memory so that another fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.model_store.eviction import HeldImage, choose_victims

pytestmark = pytest.mark.core


def held(
    key: int, nbytes: int, *, busy: bool = False, superseded: bool = False, used: float = 0
) -> HeldImage:
    return HeldImage(key, nbytes, busy, superseded, used)


images = st.lists(
    st.builds(
        HeldImage,
        key=st.integers(0, 10**6),
        nbytes=st.integers(1, 1000),
        busy=st.booleans(),
        superseded=st.booleans(),
        last_used=st.floats(0, 1000),
    ),
    max_size=12,
    unique_by=lambda image: image.key,
)


@given(images, st.integers(0, 3000), st.integers(0, 3000))
def test_what_goes_makes_room_is_idle_and_none_of_it_goes_in_vain(
    snapshot: list[HeldImage], free: int, needed: int
) -> None:
    victims = choose_victims(snapshot, free, needed)
    by_key = {image.key: image for image in snapshot}
    idle = sum(image.nbytes for image in snapshot if not image.busy)
    if victims is None:
        assert free + idle < needed
        return
    sizes = [by_key[key].nbytes for key in victims]
    assert len(set(victims)) == len(victims)
    assert not any(by_key[key].busy for key in victims)
    assert free + sum(sizes) >= needed
    assert all(free + sum(sizes) - size < needed for size in sizes)


@given(images, st.integers(0, 3000))
def test_the_decision_does_not_depend_on_the_order_of_the_snapshot(
    snapshot: list[HeldImage], needed: int
) -> None:
    assert choose_victims(snapshot, 0, needed) == choose_victims(snapshot[::-1], 0, needed)


def test_nothing_goes_when_there_is_room() -> None:
    assert choose_victims([held(1, 10)], 5, 5) == []


def test_the_one_unused_for_longest_goes_first() -> None:
    assert choose_victims([held(1, 10, used=2), held(2, 10, used=1), held(3, 10, used=3)], 0, 10) == [2]


def test_a_checkpoint_that_an_engine_image_replaces_goes_before_older_ones() -> None:
    assert choose_victims([held(1, 10, used=1), held(2, 10, used=9, superseded=True)], 0, 10) == [2]


def test_leased_images_never_go() -> None:
    assert choose_victims([held(1, 10, busy=True), held(2, 10)], 0, 15) is None


def test_a_small_old_image_is_spared_when_the_next_is_enough_alone() -> None:
    assert choose_victims([held(1, 1, used=1), held(2, 10, used=2)], 0, 10) == [2]
