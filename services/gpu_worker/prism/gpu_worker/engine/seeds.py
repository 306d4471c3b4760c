"""Per-request sampling seeds in SGLang.

SGLang reads `sampling_seed` only in its deterministic mode, which not every attention backend has, which
gives all requests without a seed the same one, and whose noise comes from a Triton kernel. The gateway
gives every request a seed, so here each batch gets the tensor of its requests' seeds, and draws with it.
"""

from typing import Any

from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from prism.gpu_worker.engine.device_copies import on_device
from prism.gpu_worker.engine.seeded_sampling import sample_with_seed


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
