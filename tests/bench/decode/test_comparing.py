"""Rates that hold nothing but decoding, and likeness up to the first near-tie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.bench.decode.comparing import comparable_tokens, decode_rate, likeness

pytestmark = pytest.mark.core


def test_what_a_request_costs_beside_its_tokens_is_no_part_of_the_rate() -> None:
    # 8 streams at 100 tok/s each, half a second of everything else.
    seconds = [0.5 + tokens / 100 for tokens in (10, 110)]
    assert decode_rate(8, 10, 110, [seconds[0]], [seconds[1]]) == pytest.approx(800)


def test_slow_rounds_do_not_count() -> None:
    assert decode_rate(1, 0, 10, [1.5, 1.0, 9.0], [2.0, 8.0, 3.0]) == pytest.approx(10)


def test_answers_may_part_at_a_near_tie_and_after_it() -> None:
    like = likeness([[1, 2, 9, 9]], [[1, 2, 3, 4]], [[1.0, 1.0, 0.1, 1.0]], 0.25)
    assert (like.equal, like.mismatches, like.compared_tokens) == (0, 0, 2)


def test_answers_that_part_before_any_near_tie_are_a_mismatch() -> None:
    like = likeness([[1, 9, 3]], [[1, 2, 3]], [[1.0, 1.0, 0.1]], 0.25)
    assert (like.equal, like.mismatches) == (0, 1)


def test_an_answer_that_ends_early_is_a_mismatch() -> None:
    assert likeness([[1]], [[1, 2]], [[1.0, 1.0]], 0.25).mismatches == 1


def test_as_many_answers_must_be_there_on_both_sides() -> None:
    with pytest.raises(ValueError, match="zip"):
        likeness([[1]], [[1], [2]], [[1.0], [1.0]], 0.25)


margins = st.lists(st.floats(0, 5), max_size=30)


@given(margins, st.floats(0, 5))
def test_no_token_that_is_compared_is_a_near_tie(given_margins: list[float], near_tie: float) -> None:
    count = comparable_tokens(given_margins, near_tie)
    assert all(margin >= near_tie for margin in given_margins[:count])
    assert count == len(given_margins) or given_margins[count] < near_tie


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.data())
def test_an_answer_equals_itself(answer: list[int], data: st.DataObject) -> None:
    sized = st.lists(st.floats(0, 5), min_size=len(answer), max_size=len(answer))
    like = likeness([answer], [answer], [data.draw(sized)], 0.25)
    assert (like.equal, like.mismatches) == (1, 0)
