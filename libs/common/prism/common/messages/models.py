"""What is known of a model: what its operator asked for (spec) and what its folder says (facts).

Both live in the KV bucket `prism_models`, under `spec.<token>` and `facts.<token>`.
"""

import enum

import msgspec


class Tier(enum.StrEnum):
    """How near to serving a model is, nearest first."""

    ACTIVE = "active"
    DOZING = "dozing"
    FROZEN = "frozen"
    STAGED = "staged"
    COLD = "cold"


class ModelState(enum.StrEnum):
    """Where a model stands on one worker: the tiers, the ways between them, and failure."""

    COLD = "cold"
    STAGING = "staging"
    STAGED = "staged"
    STARTING = "starting"
    DOZING = "dozing"
    FROZEN = "frozen"
    WAKING = "waking"
    ACTIVE = "active"
    DRAINING = "draining"
    FAILED = "failed"


class InitialPlacement(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Where a model starts: cluster-wide `gpu_ids` (tp_size of them), active at once if `on`,
    with at most `max_memory_pool_size` GB (10^9 bytes) of KV cache."""

    gpu_ids: list[int]
    on: bool = True
    max_memory_pool_size: float | None = None


class ModelSpec(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One entry of a placement file. Fields after `init_placements` are ours, all optional.

    `pin`: never leaves its GPU nor goes to sleep. `minimum_tier`: never sinks below it.
    `idle_timeout_s`: sleeps after so long without requests even if nobody wants the memory.
    """

    model_name: str
    model_path: str
    tokenizer_path: str | None = None
    tp_size: int = 1
    init_placements: list[InitialPlacement] = []
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    priority: int = 0
    pin: bool = False
    replicas: int = 1
    minimum_tier: Tier = Tier.COLD
    idle_timeout_s: float | None = None


class ModelFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model store read in a model's folder. `error` is set instead when it could not.

    `parameters` counts elements as the engine holds them (tied embeddings once); `kv_elements_per_token`
    counts elements of K and V of all layers; `checkpoint_bytes` is the size of the weights on disk.
    `tokenizer` is the key of the tokenizer bundle in the object store `prism_tokenizers`.
    """

    model: str
    fingerprint: str = ""
    parameters: int = 0
    checkpoint_bytes: int = 0
    kv_elements_per_token: int = 0
    context_length: int = 0
    vocab_size: int = 0
    checkpoint_dtype: str = ""
    architecture: str = ""
    eos_token_ids: list[int] = []
    tokenizer: str = ""
    error: str | None = None


class TokenizerBundle(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that a gateway needs to speak a model's language, as stored in `prism_tokenizers`.

    `tokenizer_json` is the file of the `tokenizers` library; `special_tokens` maps names (bos_token,
    eos_token, ...) to their text, for chat templates.
    """

    tokenizer_json: str
    chat_template: str | None = None
    special_tokens: dict[str, str] = {}
