"""Profiles by a GPU's name."""

import pytest

from prism.gpu_worker.devices.gpu_kind import PROFILES, profile_of
from prism.scheduling.profiles import profile_names

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 NVL", ""),
        ("NVIDIA A100-SXM4-80GB", ""),
    ],
)
def test_only_gpus_that_are_known_have_a_profile(name: str, profile: str) -> None:
    assert profile_of(name) == profile


def test_all_of_them_come_with_prism() -> None:
    assert set(PROFILES.values()) <= set(profile_names())
