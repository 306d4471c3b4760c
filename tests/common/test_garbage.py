"""Garbage is collected later, and only if it was before."""

import gc

import pytest

from prism.common.garbage import garbage_collected_later

pytestmark = pytest.mark.core


def test_not_within_the_block_even_if_it_fails_and_again_afterwards() -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise LookupError("on purpose")

    with pytest.raises(LookupError, match="on purpose"), garbage_collected_later():
        fail()
    assert (seen, gc.isenabled()) == ([False], True)


def test_whoever_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with garbage_collected_later():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
