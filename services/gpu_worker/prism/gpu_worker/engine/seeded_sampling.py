"""Drawing tokens with a seed a request: one number in [0, 1) from (seed, position) picks each token.

What else is in the batch does not matter, and nothing but torch is needed.
"""

import torch

SPLITMIX_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
SPLITMIX_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
SPLITMIX_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
UNIFORM_BITS = 53


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each (seed, position), float64, shape (n,). SplitMix64 of both (Steele 2014)."""
    state = _mix(seeds.to(torch.int64) + SPLITMIX_GAMMA) + positions.to(torch.int64) * SPLITMIX_GAMMA
    bits = _shift_right(_mix(state), 64 - UNIFORM_BITS)
    return bits.to(torch.float64) / float(1 << UNIFORM_BITS)


def _mix(state: torch.Tensor) -> torch.Tensor:
    state = (state ^ _shift_right(state, 30)) * SPLITMIX_MIX_1
    state = (state ^ _shift_right(state, 27)) * SPLITMIX_MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    # A logical shift: torch shifts the sign bit in.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def without_unlikely(probs: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Probabilities (n, m), those below their row's `min_ps` (n) of the row's highest set to 0."""
    least = probs.amax(dim=-1, keepdim=True) * min_ps.view(-1, 1)
    return probs.masked_fill(probs < least, 0.0)


def sample_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One index a row, shape (n, 1), drawn from log-probabilities (n, m), normalised or not."""
    cumulative = logprobs.to(torch.float64).exp().cumsum(dim=-1)
    threshold = uniform(seed, positions).view(-1, 1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.clamp_(max=logprobs.shape[-1] - 1)
