"""The one decision that is not asked for: a request that has the GPU to itself."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.scheduling.admission import EngineCapacity, GpuWork, QueuedRequest, policies

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", sorted(policies))
@given(
    prompt=st.integers(1, 100_000),
    slo_s=st.one_of(st.just(inf), st.floats(0.001, 100)),
    waited_s=st.floats(0, 100),
    running=st.integers(0, 3),
    recent_s=st.floats(0, 2),
    others=st.integers(0, 4),
)
def test_every_policy_starts_a_request_that_has_the_gpu_to_itself(
    name: str, prompt: int, slo_s: float, waited_s: float, running: int, recent_s: float, others: int
) -> None:
    """The simulator starts such a request without asking: it has room, and nobody computes."""
    now = 1000.0
    request = QueuedRequest("1", "m", now - waited_s, prompt, 10, now + 60, ttft_slo_s=slo_s)
    engine = EngineCapacity(running, 8, prompt + 10, True, 5000.0, 0.01, 0, 0.01, 0.05)
    engines = {"m": engine} | {f"o{i}": EngineCapacity(0, 8, 1000, tpot_slo_s=0.01) for i in range(others)}
    admission = policies[name]().select([request], engines, GpuWork(now - 0.5, recent_s, 0.0), now)
    assert admission.rids == ["1"]
