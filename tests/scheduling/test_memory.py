"""Sizes: the same arithmetic for whoever plans and whoever reserves."""

import pytest

from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec
from prism.scheduling.memory import footprint, kv_bytes_per_token, kv_reservation, weights_bytes

pytestmark = pytest.mark.core

FACTS = ModelFacts(
    "m",
    parameters=1000,
    checkpoint_bytes=2400,
    kv_elements_per_token=7,
    context_length=100,
    checkpoint_dtype="bfloat16",
)


def facts(dtype: str) -> ModelFacts:
    return ModelFacts(
        "m", parameters=1000, checkpoint_bytes=600, kv_elements_per_token=7, checkpoint_dtype=dtype
    )


def with_pool(gigabytes: float | None, tp_size: int = 1) -> ModelSpec:
    placement = InitialPlacement(list(range(tp_size)), max_memory_pool_size=gigabytes)
    return ModelSpec("m", "/m", tp_size=tp_size, init_placements=[placement])


def test_a_device_with_its_own_element_size_decides_the_size_of_weights_and_kv() -> None:
    assert weights_bytes(FACTS, 4) == 4000
    assert kv_bytes_per_token(FACTS, 4) == 28


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", "BF16", "float16"])
def test_a_device_that_keeps_the_checkpoints_elements_counts_each_parameter_once(dtype: str) -> None:
    assert weights_bytes(facts(dtype), None) == 2000
    assert kv_bytes_per_token(facts(dtype), None) == 14


def test_quantised_weights_take_what_they_take_on_disk_and_keep_kv_in_the_compute_type() -> None:
    assert weights_bytes(facts("fp8"), None) == 600
    assert kv_bytes_per_token(facts("fp8"), None) == 14


def test_tensor_parallelism_divides_both_rounded_up() -> None:
    assert weights_bytes(FACTS, 1, 3) == 334
    assert kv_bytes_per_token(FACTS, 1, 2) == 4


def test_the_pool_of_the_first_initial_placement_is_the_quota_in_whole_tokens() -> None:
    assert kv_reservation(with_pool(1e-6), FACTS, 4) == 1000 // 28 * 28
    assert kv_reservation(with_pool(1e-6, tp_size=2), FACTS, 4) == 1000 // 14 * 14


def test_without_a_pool_two_requests_of_full_length_fit() -> None:
    assert kv_reservation(with_pool(None), FACTS, 4) == 2 * 100 * 28
    assert kv_reservation(ModelSpec("m", "/m"), FACTS, 4) == 2 * 100 * 28


def test_a_pool_smaller_than_a_token_still_holds_one() -> None:
    assert kv_reservation(with_pool(1e-9), FACTS, 4) == 28


def test_a_model_without_a_kv_cache_reserves_none() -> None:
    assert kv_reservation(with_pool(1), ModelFacts("m", parameters=10), 4) == 0


def test_the_footprint_is_weights_and_quota() -> None:
    assert footprint(with_pool(1e-6), FACTS, 4) == 4000 + 980
