"""Each mode builds on the one before: homes are kept or not, KV cache too."""

import pytest

from prism.common.errors import PrismError
from prism.common.modes import DEFAULT_MODE, MODES, keeps_homes, keeps_kv_quotas, policy_in

pytestmark = pytest.mark.core


def test_what_each_keeps() -> None:
    assert {mode: (keeps_homes(mode), keeps_kv_quotas(mode)) for mode in MODES} == {
        "static": (True, True),
        "elastic": (True, False),
        DEFAULT_MODE: (False, False),
    }


@pytest.mark.parametrize("mode", ["static", "elastic"])
def test_where_homes_are_kept_one_policy_decides_and_no_other_may_be_chosen(mode: str) -> None:
    assert policy_in(mode, None, "balanced") == policy_in(mode, "static", "balanced") == "static"
    with pytest.raises(PrismError, match="--policy kvpr decides nothing"):
        policy_in(mode, "kvpr", "balanced")


def test_else_the_one_that_was_chosen() -> None:
    assert policy_in("full", None, "balanced") == "balanced"
    assert policy_in("full", "static", "balanced") == "static"
