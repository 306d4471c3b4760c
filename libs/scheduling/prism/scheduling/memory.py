"""How many bytes a model takes: one arithmetic for the scheduler that plans and the worker that reserves.

All sizes are bytes on one GPU. `element_bytes` is the size of a weight or KV element on the device as its
worker reports it; None means that the device keeps the checkpoint's own.
"""

from prism.common.messages.models import ModelFacts, ModelSpec

GB = 10**9
DEFAULT_CONTEXTS = 2
FLOOR_TOKENS = 8192
COMPUTE_BYTES = 2

_FLOAT_BYTES = {
    "float64": 8,
    "f64": 8,
    "float32": 4,
    "f32": 4,
    "float16": 2,
    "f16": 2,
    "bfloat16": 2,
    "bf16": 2,
}


def weights_bytes(facts: ModelFacts, element_bytes: int | None, tp_size: int = 1) -> int:
    """Weights on one of `tp_size` GPUs, rounded up.

    Where the device keeps the checkpoint's own elements, a plain float type counts every parameter once (a
    checkpoint may store tied embeddings twice); anything else, quantised weights above all, takes what it
    takes on disk.
    """
    size = element_bytes or _float_bytes(facts)
    total = facts.parameters * size if size and facts.parameters else facts.checkpoint_bytes
    return -(-total // tp_size)


def kv_bytes_per_token(facts: ModelFacts, element_bytes: int | None, tp_size: int = 1) -> int:
    """KV cache that one token takes on one of `tp_size` GPUs; 0 for a model without a KV cache.

    Quantised checkpoints keep their KV cache in the type that they compute in.
    """
    size = element_bytes or _float_bytes(facts) or COMPUTE_BYTES
    return -(-facts.kv_elements_per_token * size // tp_size)


def kv_reservation(spec: ModelSpec, facts: ModelFacts, element_bytes: int | None) -> int:
    """The KV quota that a model is activated with on each of its GPUs: a whole number of tokens.

    `max_memory_pool_size` of its first initial placement if that is given, else room for DEFAULT_CONTEXTS
    requests of full length.
    """
    token = kv_bytes_per_token(facts, element_bytes, spec.tp_size)
    if token == 0:
        return 0
    pool = spec.init_placements[0].max_memory_pool_size if spec.init_placements else None
    tokens = int(pool * GB) // token if pool is not None else DEFAULT_CONTEXTS * facts.context_length
    return max(1, tokens) * token


def kv_floor(spec: ModelSpec, facts: ModelFacts, element_bytes: int | None) -> int:
    """The KV cache that an active model keeps on each of its GPUs when memory moves between models: a request
    of full length, FLOOR_TOKENS or its whole reservation, whichever is least."""
    token = kv_bytes_per_token(facts, element_bytes, spec.tp_size)
    tokens = min(facts.context_length, FLOOR_TOKENS)
    return min(kv_reservation(spec, facts, element_bytes), max(1, tokens) * token)


def footprint(spec: ModelSpec, facts: ModelFacts, element_bytes: int | None) -> int:
    """What an active model reserves on each of its GPUs: weights and KV quota."""
    return weights_bytes(facts, element_bytes, spec.tp_size) + kv_reservation(spec, facts, element_bytes)


def _float_bytes(facts: ModelFacts) -> int:
    return _FLOAT_BYTES.get(facts.checkpoint_dtype.lower().removeprefix("torch."), 0)
