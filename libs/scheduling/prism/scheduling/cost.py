"""Seconds and bytes of prefill, decode, wake and move: one arithmetic for planning and for the simulator.

A roofline: prefill is bound by arithmetic (two operations per parameter and token), a decode step by reading
the weights and the KV cache of its batch once; both carry a fixed cost per step. What a kind of GPU reaches
of either is a `GpuProfile`, fitted from measurements. Everything about a model comes from its own config.
"""

import msgspec

from prism.common.messages.models import ModelFacts, Tier
from prism.scheduling.memory import kv_bytes_per_token, weights_bytes

OPERATIONS_PER_PARAMETER = 2


class GpuProfile(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one kind of GPU, with its host, reaches. Rates are per second, `source` says where they come from.

    `operations_per_s` in prefill, `memory_bytes_per_s` in decode, `bus_bytes_per_s` from host memory,
    `disk_bytes_per_s` into it. Fixed costs in seconds: of a prefill, of a decode step, of a decode step per
    sequence, of a wake beside the copy, of a doze, of a thaw beside the wake, of a freeze, of having a warm
    shell take a model. A prefill of any length passes through the weights once, at `prefill_bytes_per_s`
    (None: as decode does); `request_s` is what a request takes on its way to and from the engine, which keeps
    no GPU busy. `context_bytes` is what an engine holds of GPU memory beside weights and KV cache,
    awake or dozing. Splitting over two GPUs reaches `tensor_parallel_efficiency` of twice the speed, and so
    on. As many as `parallel_engines` compute at once as fast as alone, more share that evenly; to an engine
    that prefills that number is `prefill_parallel_engines` (None: the same): the GPU may be others' while its
    host launches kernels.
    """

    name: str
    memory_bytes: int
    operations_per_s: float
    memory_bytes_per_s: float
    bus_bytes_per_s: float
    disk_bytes_per_s: float = 2e9
    prefill_fixed_s: float = 0.0
    decode_fixed_s: float = 0.0
    decode_sequence_s: float = 0.0
    wake_fixed_s: float = 0.0
    doze_s: float = 0.0
    thaw_fixed_s: float = 0.0
    freeze_s: float = 0.0
    shell_s: float = 0.0
    context_bytes: int = 0
    tensor_parallel_efficiency: float = 0.85
    source: str = ""
    prefill_bytes_per_s: float | None = None
    request_s: float = 0.0
    parallel_engines: float = 1.0
    prefill_parallel_engines: float | None = None


class ModelCost(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one model costs on one kind of GPU, on each of the GPUs that an instance is spread over."""

    weights_bytes: int
    kv_bytes_per_token: int
    prefill_fixed_s: float
    prefill_token_s: float
    decode_fixed_s: float
    decode_sequence_s: float
    decode_kv_token_s: float
    wake_s: float
    thaw_s: float
    staged_s: float
    cold_s: float
    doze_s: float
    context_bytes: int = 0
    request_s: float = 0.0

    def prefill_s(self, tokens: int) -> float:
        """Seconds to prefill so many prompt tokens, on a GPU that does nothing else."""
        return self.prefill_fixed_s + tokens * self.prefill_token_s

    def decode_step_s(self, sequences: int, kv_tokens: float) -> float:
        """Seconds of a step that gives each of `sequences` a token; they hold `kv_tokens` in all."""
        return self.decode_fixed_s + sequences * self.decode_sequence_s + kv_tokens * self.decode_kv_token_s

    def ready_s(self, tier: Tier) -> float:
        """Seconds from the command to serving, for a model that is in `tier`."""
        match tier:
            case Tier.ACTIVE:
                return 0.0
            case Tier.DOZING:
                return self.wake_s
            case Tier.FROZEN:
                return self.thaw_s
            case Tier.STAGED:
                return self.staged_s
            case Tier.COLD:
                return self.cold_s


def model_cost(
    facts: ModelFacts, profile: GpuProfile, *, element_bytes: int | None = None, tp_size: int = 1
) -> ModelCost:
    """The cost of a model by its own config on GPUs of one kind, `tp_size` of them to an instance."""
    weights = weights_bytes(facts, element_bytes, tp_size)
    kv_token = kv_bytes_per_token(facts, element_bytes, tp_size)
    reached = 1.0
    split = tp_size
    while split > 1:
        reached *= profile.tensor_parallel_efficiency
        split = -(-split // 2)
    parameters = facts.parameters / tp_size
    copy_s = weights / profile.bus_bytes_per_s
    wake_s = profile.wake_fixed_s + copy_s
    staged_s = profile.shell_s + wake_s
    return ModelCost(
        weights_bytes=weights,
        kv_bytes_per_token=kv_token,
        prefill_fixed_s=profile.prefill_fixed_s
        + weights / ((profile.prefill_bytes_per_s or profile.memory_bytes_per_s) * reached),
        prefill_token_s=OPERATIONS_PER_PARAMETER * parameters / (profile.operations_per_s * reached),
        decode_fixed_s=profile.decode_fixed_s + weights / (profile.memory_bytes_per_s * reached),
        decode_sequence_s=profile.decode_sequence_s
        + OPERATIONS_PER_PARAMETER * parameters / (profile.operations_per_s * reached),
        decode_kv_token_s=kv_token / (profile.memory_bytes_per_s * reached),
        wake_s=wake_s,
        thaw_s=profile.thaw_fixed_s + wake_s,
        staged_s=staged_s,
        cold_s=staged_s + weights / profile.disk_bytes_per_s,
        doze_s=profile.doze_s,
        context_bytes=profile.context_bytes,
        request_s=profile.request_s,
    )
