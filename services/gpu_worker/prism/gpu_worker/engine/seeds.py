"""Per-request sampling seeds.

SGLang reads `sampling_seed` only in its deterministic mode, which not every attention backend has, which
gives all requests without a seed the same one, and whose noise comes from a Triton kernel. The gateway
gives every request a seed, so here each batch gets the tensor of its requests' seeds, and a token is
drawn with one number in [0, 1) made from its request's seed and its position: what else is in the batch
does not matter.
"""

from typing import Any

import torch
from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

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


def sample_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One index a row, shape (n, 1), drawn from log-probabilities (n, m), normalised or not."""
    cumulative = logprobs.to(torch.float64).exp().cumsum(dim=-1)
    threshold = uniform(seed, positions).view(-1, 1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.clamp_(max=logprobs.shape[-1] - 1)


def install() -> None:
    """Make every sampling batch of this process carry its requests' seeds, and draw with them."""
    original = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls: type[Any], batch: Any, vocab_size: int) -> Any:
        info = original(cls, batch, vocab_size)
        if info.sampling_seed is None:
            seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
            info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.multinomial_with_seed = sample_with_seed
