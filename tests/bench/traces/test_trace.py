"""What can be done to a trace."""

import pytest

from prism.bench.traces.trace import Trace, head, mapped, only, replicated, scaled, trace_of
from prism.common.errors import PrismError

pytestmark = pytest.mark.core


def three() -> Trace:
    return trace_of(("cold", "hot"), [(1.0, 1, 10, 5), (2.0, 0, 20, 6), (4.0, 1, 30, 7)])


def test_a_rate_scale_divides_the_gaps() -> None:
    assert list(scaled(three(), 2.0).arrival_s) == [0.5, 1.0, 2.0]
    with pytest.raises(PrismError, match="above 0"):
        scaled(three(), 0.0)


def test_replication_multiplies_the_rate_without_simultaneous_copies() -> None:
    doubled = replicated(three(), 2)
    assert len(doubled) == 6
    assert len(set(doubled.arrival_s)) == 6
    assert doubled.counts() == {"cold": 2, "hot": 4}
    assert list(doubled.arrival_s) == sorted(doubled.arrival_s)


def test_the_head_and_one_models_part() -> None:
    assert list(head(three(), 3.0).arrival_s) == [1.0, 2.0]
    assert list(only(three(), 1).prompt_tokens) == [10, 30]


def test_models_are_mapped_by_popularity() -> None:
    trace = mapped(three(), ["first", "second", "third"])
    assert trace.models == ("first", "second", "third")
    assert list(trace.model) == [0, 1, 0]


def test_names_that_are_there_stay_and_the_mapping_comes_first() -> None:
    assert list(mapped(three(), ["other", "cold"]).model) == [0, 1, 0]
    assert list(mapped(three(), ["a", "b"], {"cold": "a"}).model) == [1, 0, 1]


def test_more_models_in_the_trace_than_serve_go_round() -> None:
    trace = trace_of(("x", "y", "z"), [(0.0, 0, 1, 1), (1.0, 1, 1, 1), (2.0, 2, 1, 1)])
    assert list(mapped(trace, ["a", "b"]).model) == [0, 1, 0]


def test_a_mapping_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(PrismError, match="the trace has no model 'warm'"):
        mapped(three(), ["a"], {"warm": "a"})
