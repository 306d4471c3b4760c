"""The search for the least number of GPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.bench.simulation.capacity import least_gpus

pytestmark = pytest.mark.core


@given(needed=st.integers(1, 100), least=st.integers(1, 8))
def test_it_finds_the_least_of_a_rising_attainment(needed: int, least: int) -> None:
    def measure(gpus: int) -> float:
        return 1.0 if gpus >= needed else 0.5

    found = least_gpus(measure, 0.99, least=least, most=64)
    assert found.gpus == (max(least, needed) if needed <= 64 else None)
    assert max(found.tried) <= 64


def test_each_number_is_measured_once() -> None:
    asked: list[int] = []

    def measure(gpus: int) -> float:
        asked.append(gpus)
        return gpus / 13

    assert least_gpus(measure, 1.0, least=1, most=64).gpus == 13
    assert len(asked) == len(set(asked)) <= 9
