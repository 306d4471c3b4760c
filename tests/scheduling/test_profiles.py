"""Cost profiles by name, as schedulers and the simulator share them."""

import pytest

from prism.scheduling.profiles import profile_names, shipped_profiles

pytestmark = pytest.mark.core


def test_every_profile_goes_by_its_own_name_and_says_where_it_is_from() -> None:
    profiles = shipped_profiles()
    assert {"cpu", "h100-80gb", "h200"} <= profiles.keys()
    assert sorted(profiles) == profile_names()
    for name, profile in profiles.items():
        assert profile.name == name
        assert profile.source
