"""Whose facts stand when stores of several nodes find different things."""

import pytest

from prism.common.messages.models import ModelFacts
from prism.model_store.registering import replaces

pytestmark = pytest.mark.core

THEIRS = ModelFacts("m", fingerprint="1", version="old", tokenizer="t", node="there")
SAME_HERE = ModelFacts("m", fingerprint="2", version="old", tokenizer="t", node="here")
OTHER_HERE = ModelFacts("m", fingerprint="2", version="new", tokenizer="t", node="here")
OTHER_TOKENIZER = ModelFacts("m", fingerprint="2", version="old", tokenizer="u", node="here")
UNREADABLE = ModelFacts("m", error="it is cut off", node="here")
THEIR_ERROR = ModelFacts("m", error="it is gone", node="there")
OURS = ModelFacts("m", fingerprint="1", version="old", tokenizer="t", node="here")
OF_AN_OLDER_RELEASE = ModelFacts("m", fingerprint="1", tokenizer="t")


def put(present: ModelFacts | None, found: ModelFacts, *, came_now: bool = False, gone: bool = False) -> bool:
    return replaces(present, found, came_now=came_now, finder_gone=gone)


@pytest.mark.parametrize("found", [SAME_HERE, UNREADABLE])
def test_where_nothing_stands_anything_does(found: ModelFacts) -> None:
    assert put(None, found)


@pytest.mark.parametrize("found", [OTHER_HERE, OTHER_TOKENIZER])
def test_what_another_node_found_stands_unless_it_has_gone_or_this_came_just_now(found: ModelFacts) -> None:
    assert not put(THEIRS, found)
    assert put(THEIRS, found, came_now=True)
    assert put(THEIRS, found, gone=True)


def test_the_same_in_other_files_is_no_news() -> None:
    assert not put(THEIRS, SAME_HERE, came_now=True, gone=True)


def test_a_store_replaces_what_it_found_itself() -> None:
    assert put(OURS, OTHER_HERE)
    assert put(OURS, SAME_HERE), "other files, of which images are made anew"
    assert put(OURS, UNREADABLE)
    assert not put(OURS, OURS)
    assert put(OF_AN_OLDER_RELEASE, SAME_HERE)


def test_an_error_replaces_only_what_was_found_on_the_same_node() -> None:
    assert not put(THEIRS, UNREADABLE, came_now=True, gone=True)
    assert not put(THEIR_ERROR, UNREADABLE, came_now=True, gone=True), "they would take turns for ever"
    assert put(UNREADABLE, ModelFacts("m", error="it is gone", node="here"))


def test_what_can_be_read_replaces_an_error() -> None:
    assert put(THEIR_ERROR, SAME_HERE)
