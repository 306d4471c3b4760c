"""Tokens drawn with a seed depend on seed and position alone, and follow the distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism.gpu_worker.engine.seeded_sampling import sample_with_seed, uniform, without_unlikely

pytestmark = pytest.mark.core


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6)), min_size=1, max_size=20))
def test_numbers_lie_in_the_unit_interval_and_do_not_depend_on_the_batch(
    pairs: list[tuple[int, int]],
) -> None:
    seeds = torch.tensor([seed for seed, _ in pairs])
    positions = torch.tensor([position for _, position in pairs])
    together = uniform(seeds, positions)
    assert torch.all(together >= 0)
    assert torch.all(together < 1)
    for index in range(len(pairs)):
        assert uniform(seeds[index : index + 1], positions[index : index + 1])[0] == together[index]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = 20_000
    picked = sample_with_seed(
        probabilities.log().expand(draws, -1), torch.arange(draws), torch.zeros(draws, dtype=torch.int64)
    )
    shares = torch.bincount(picked.view(-1), minlength=4) / draws
    assert shares[1] == 0
    assert torch.allclose(shares, probabilities, atol=0.015)


def test_positions_of_one_seed_are_independent_draws() -> None:
    positions = torch.arange(20_000)
    numbers = uniform(torch.full_like(positions, 42), positions)
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    correlation = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(float(correlation)) < 0.03


def test_a_token_without_probability_is_never_drawn() -> None:
    logprobs = torch.tensor([[-float("inf"), 0.0, -float("inf")]])
    for seed in range(200):
        assert int(sample_with_seed(logprobs, torch.tensor([seed]), torch.tensor([3]))) == 1


def test_min_p_takes_away_what_is_far_less_likely_than_the_likeliest() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.9, 0.1, 0.0, 0.0]])
    left = without_unlikely(probs, torch.tensor([0.5, 1.0, 0.0]))
    assert left.tolist() == [[0.5, pytest.approx(0.3), 0, 0], [0.25] * 4, pytest.approx([0.9, 0.1, 0, 0])]
