"""What is known of a model: what its operator asked for (spec) and what its folder says (facts).

Both live in the KV bucket `prism_models`, under `spec.<token>` and `facts.<token>`.
"""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta


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


MOST = 1_000_000
"""Beyond any count, size in GB, time in seconds or priority that makes sense: keeps typing errors out."""

Milliseconds = Annotated[float, Meta(ge=0.001, le=3_600_000)]


class InitialPlacement(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Where a model starts."""

    gpu_ids: Annotated[
        list[Annotated[int, Meta(ge=0, le=MOST)]],
        Meta(
            min_length=1,
            description="Cluster-wide ids of the GPUs, tp_size of them, each once",
            extra_json_schema={"uniqueItems": True},
        ),
    ]
    on: Annotated[
        bool,
        Meta(
            description="Whether the model is active here from the start; unless the policy is static "
            "only the first that is on counts, and replicas says how many there are"
        ),
    ] = True
    max_memory_pool_size: Annotated[
        Annotated[float, Meta(gt=0, le=MOST)] | None,
        Meta(
            description="KV cache on each of its GPUs at most, in GB (10^9 bytes), and what it starts with "
            "where that is free; that of the first placement in the list counts; left out: it starts with "
            "room for two full contexts"
        ),
    ] = None


class ModelSpec(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One entry of a placement file: a model and what its operator asks for."""

    model_name: Annotated[
        str,
        Meta(min_length=1, max_length=256, description="What requests call it; no other model has the name"),
    ]
    model_path: Annotated[
        str,
        Meta(
            min_length=1,
            description="Folder of config.json, tokenizer and safetensors (relative to the placement file if "
            "it is there), or a Hugging Face id",
        ),
    ]
    tokenizer_path: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="Folder or Hugging Face id of the tokenizer, if not the model's"),
    ] = None
    tp_size: Annotated[
        int, Meta(ge=1, le=1024, description="GPUs that one instance is spread over (tensor parallelism)")
    ] = 1
    init_placements: Annotated[
        list[InitialPlacement],
        Meta(
            description="Where it starts; left out or empty: wherever memory is free, once it is asked for "
            "or its policy starts it"
        ),
    ] = []
    ttft_slo_ms: Annotated[
        Milliseconds | None, Meta(description="Objective for the time to the first token, in ms")
    ] = None
    tpot_slo_ms: Annotated[
        Milliseconds | None, Meta(description="Objective for the time per token after the first, in ms")
    ] = None
    priority: Annotated[
        int,
        Meta(
            ge=-MOST,
            le=MOST,
            description="Who gives way: lower sleeps first, gets KV cache last, and its requests are given "
            "up first where not all first tokens can be on time",
        ),
    ] = 0
    pin: Annotated[
        bool,
        Meta(description="Never sleeps; elsewhere than on its GPUs only while those are gone or fail it"),
    ] = False
    replicas: Annotated[
        int,
        Meta(
            ge=1,
            le=MOST,
            description="How many instances, each on a worker of its own, where memory is free; the policy "
            "balanced adds more while one GPU is too little",
        ),
    ] = 1
    minimum_tier: Annotated[
        Tier,
        Meta(
            description="The scheduler does not put it below this; staged is as cold: the store evicts "
            "weights that nobody uses"
        ),
    ] = Tier.COLD
    idle_timeout_s: Annotated[
        Annotated[float, Meta(gt=0, le=31_536_000)] | None,
        Meta(description="Sleeps after so many seconds without requests, even if nobody wants its memory"),
    ] = None


def same_version(one: str, other: str) -> bool:
    """Whether two versions of a model may be the same: an empty one, of a peer that names none, is any."""
    return not one or not other or one == other


class ModelFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model store read in a model's folder. `error` is set instead when it could not.

    `version` tells configuration and weights by samples of their content, and is the same on every node;
    `fingerprint` tells the files of `node`, whose store found them, modification times included.

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
    version: str = ""
    node: str = ""


class TokenizerBundle(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that a gateway needs to speak a model's language, as stored in `prism_tokenizers`.

    `tokenizer_json` is the file of the `tokenizers` library; `special_tokens` maps names (bos_token,
    eos_token, ...) to their text, for chat templates. With `add_bos` prompts begin with bos_token, also where
    that file does not say so.
    """

    tokenizer_json: str
    chat_template: str | None = None
    special_tokens: dict[str, str] = {}
    add_bos: bool = False
