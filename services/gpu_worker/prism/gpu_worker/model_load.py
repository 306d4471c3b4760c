"""What a worker reports of one model: what is there, and of one on its way up what it will take."""

import logging
import time

from prism.common.errors import PrismError
from prism.common.messages.load import ModelLoad
from prism.common.telemetry import about
from prism.gpu_worker.instance_memory import kv_bytes_of
from prism.gpu_worker.model_instance import IN_TRANSITION, ModelInstance

log = logging.getLogger(__name__)


def told_bytes(instance: ModelInstance) -> tuple[int, int]:
    """Behind weights and KV cache, as kernel or driver count it; where they don't, what is reserved."""
    try:
        return instance.counted.resident_bytes()
    except PrismError as error:
        log.debug("%s", error.message, extra=about(model=instance.name))
        return instance.memory.reserved_weights_bytes, instance.memory.quota_bytes


def load_of(instance: ModelInstance, queued: int, kv_wanted_tokens: int) -> ModelLoad:
    """What there is to report of `instance` now; bytes are what the kernel says is there. Of its requests
    `queued` wait here, and all of them want `kv_wanted_tokens` of its KV cache.

    On its way up, weights are at least what is reserved for them and for its process."""
    weights, kv = told_bytes(instance)
    if instance.state in IN_TRANSITION:
        # Placement takes what an activation in flight has not yet off what is free, where all that is
        # reserved is taken off already. It has no other word for a process's cost than the weights.
        weights = max(weights, instance.memory.reserved_beside_kv_bytes)
    engine = instance.engine_load
    running = engine.running + engine.waiting
    busy = queued + running > 0
    now = time.monotonic()
    holder = instance.kv_holder()
    record, ready = instance.record, instance.ready
    return ModelLoad(
        model=instance.name,
        state=instance.state,
        queued=queued,
        running=running,
        weights_bytes=weights,
        kv_quota_bytes=instance.memory.quota_bytes,
        kv_used_bytes=kv,
        kv_spare_bytes=holder.spare_bytes if holder is not None else 0,
        kv_wanted_bytes=kv_bytes_of(ready, kv_wanted_tokens) if ready is not None else 0,
        idle_s=0.0 if busy else now - instance.idle_since,
        state_s=now - instance.state_since,
        prompt_tokens=instance.prompt_tokens,
        generated_tokens=instance.generated_tokens,
        failure=instance.failure,
        engine_steps=engine.steps,
        queue_s=record.queue_s,
        prefill_tokens_per_s=record.prefill.reached_tokens_per_s if record.prefill.known else None,
        decode_step_s=record.step.seconds,
        requests=record.requests,
        ttft_met=record.ttft_met,
        ttft_missed=record.ttft_missed,
        tpot_met=record.tpot_met,
        tpot_missed=record.tpot_missed,
        version=instance.version,
    )
