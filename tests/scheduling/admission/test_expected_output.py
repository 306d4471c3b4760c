"""How long outputs probably get."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission.expected_output import ExpectedOutput

pytestmark = pytest.mark.core


def learned(
    outputs: list[int], quantile: float = 0.9, remembered: int = 100, enough: int = 4
) -> ExpectedOutput:
    expected = ExpectedOutput(quantile, remembered, enough)
    for tokens in outputs:
        expected.finished(tokens)
    return expected


def test_nothing_is_known_at_first() -> None:
    assert learned([5, 5, 5]).tokens(100) is None
    assert learned([5, 5, 5, 5]).tokens(100) == 5


def test_it_is_a_quantile_of_what_was_seen() -> None:
    assert learned(list(range(100)), 0.9).tokens(1000) == 90
    assert learned(list(range(100)), 1.0).tokens(1000) == 99


def test_nobody_generates_more_than_allowed() -> None:
    assert learned([50] * 4).tokens(20) == 20


def test_old_outputs_are_forgotten() -> None:
    assert learned([1000] * 10 + [3] * 10, remembered=10).tokens(5000) == 3


def test_who_has_outlived_the_expectation_may_go_on_to_the_end() -> None:
    expected = learned([50] * 4)
    assert expected.remaining(200, 20) == 30
    assert expected.remaining(200, 50) == 150
    assert expected.remaining(30, 20) == 10
    assert learned([]).remaining(200, 20) == 180


@given(st.lists(st.integers(0, 50), min_size=4, max_size=60), st.floats(0.05, 1))
def test_about_so_many_outputs_fit_into_it(outputs: list[int], quantile: float) -> None:
    remembered = outputs[-20:]
    tokens = learned(outputs, quantile, remembered=20).tokens(1000)
    assert tokens in remembered
    assert sum(output <= tokens for output in remembered) >= quantile * len(remembered) - 1e-9


@pytest.mark.parametrize("bad", [{"quantile": 0.0}, {"quantile": 1.1}, {"enough": 0}, {"enough": 200}])
def test_what_makes_no_sense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"outputs|quantile"):
        learned([], **bad)  # type: ignore[arg-type]
