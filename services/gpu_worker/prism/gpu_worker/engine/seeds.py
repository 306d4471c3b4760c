"""Per-request sampling seeds in SGLang.

SGLang reads `sampling_seed` only in its deterministic mode, which not every attention backend has, which
gives all requests without a seed the same one, and whose noise comes from a Triton kernel. The gateway
gives every request a seed, so here each batch gets the tensor of its requests' seeds, and draws with it.
"""

from typing import Any

import torch
from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from prism.gpu_worker.engine.device_copies import on_device
from prism.gpu_worker.engine.seeded_sampling import sample_with_seed, without_unlikely


def install() -> None:
    """Make every sampling batch of this process carry its requests' seeds, and draw with them."""
    original = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls: type[Any], batch: Any, vocab_size: int) -> Any:
        info = original(cls, batch, vocab_size)
        if info.sampling_seed is None:
            seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
            info.sampling_seed = on_device(seeds, batch.device)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.multinomial_with_seed = sample_with_seed
    _allow_min_p()


def _allow_min_p() -> None:
    """SGLang's own drawing with a seed would need what min_p leaves to add up to one, so it refuses it; ours
    does not. What min_p takes away are the least likely tokens, so it may do so before top_k and top_p."""
    filtered = sampler.top_k_top_p_min_p_sampling_from_probs_torch

    def sample(
        probs: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
        min_ps: torch.Tensor,
        need_min_p_sampling: bool,
        sampling_seed: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        if need_min_p_sampling:
            probs = without_unlikely(probs, min_ps)
        drawn: torch.Tensor = filtered(probs, top_ks, top_ps, min_ps, False, sampling_seed, positions)
        return drawn

    sampler.top_k_top_p_min_p_sampling_from_probs_torch = sample
