"""Stop strings are found in a stream wherever it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway.cutting import cut_text, cuts

from prism.gateway.stop_strings import StopMatch, StopStrings, find_stop

pytestmark = pytest.mark.core

LETTERS = st.text(alphabet="abc", max_size=30)


@given(
    text=LETTERS, stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4), sizes=cuts()
)
def test_stream_equals_a_search_on_the_whole_text(text: str, stops: list[str], sizes: list[int]) -> None:
    stream = StopStrings(stops)
    given_out = "".join(stream.push(piece) for piece in cut_text(text, sizes)) + stream.finish()
    found = find_stop(text, stops)
    assert stream.match == found
    assert given_out == (text if found is None else text[: found.start])


@given(text=LETTERS, stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4))
def test_search_finds_what_looking_after_every_character_finds(text: str, stops: list[str]) -> None:
    expected = None
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            expected = StopMatch(longest, end - len(longest))
            break
    assert find_stop(text, stops) == expected


def test_possible_beginning_is_held_back_until_it_is_none() -> None:
    stream = StopStrings(["END"])
    assert stream.push("the E") == "the "
    assert stream.push("N") == ""
    assert stream.push("Q") == "ENQ"
    assert stream.push("EN") == ""
    assert stream.finish() == "EN"
    assert stream.match is None


def test_nothing_passes_after_a_match() -> None:
    stream = StopStrings(["."])
    assert stream.push("one. two") == "one"
    assert stream.match == StopMatch(".", 3)
    assert stream.push("three") == ""
    assert stream.finish() == ""


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).push("anything") == "anything"
