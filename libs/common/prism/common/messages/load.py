"""Load reports of workers and demand reports of gateways."""

import msgspec

from prism.common.messages.models import ModelState


class ModelLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model on one worker. Bytes are what it holds of the device's memory now; `idle_s` is the time
    since it last had a request queued or running; `failure` says why it last failed, if it did;
    `engine_steps` counts forward passes of its engine. On its way up (staging, starting, waking) a model's
    `weights_bytes` are at least what is reserved for it beside its KV quota: weights and fixed cost.

    `kv_wanted_bytes` is what the requests here, queued ones included, would take of KV cache,
    `kv_spare_bytes` what of its quota could go to other models now without a running request noticing: 0 for
    an engine of several ranks, and of no use to others where the worker is not `elastic`. `queue_s` is how
    long requests waited lately before the engine had them. `prefill_tokens_per_s` and `decode_step_s` are
    as measured, None before that. The last four count finished requests that kept, or did not keep, their
    objectives. `gpu_ids` are those of the worker's GPUs that it is on, empty for all. `version` is the one
    that its engine was started for, awake or asleep; empty while it has none.
    """

    model: str
    state: ModelState
    queued: int = 0
    running: int = 0
    weights_bytes: int = 0
    kv_quota_bytes: int = 0
    kv_used_bytes: int = 0
    idle_s: float = 0.0
    state_s: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failure: str | None = None
    engine_steps: int = 0
    kv_wanted_bytes: int = 0
    queue_s: float = 0.0
    prefill_tokens_per_s: float | None = None
    decode_step_s: float | None = None
    requests: int = 0
    ttft_met: int = 0
    ttft_missed: int = 0
    tpot_met: int = 0
    tpot_missed: int = 0
    gpu_ids: list[int] = []
    kv_spare_bytes: int = 0
    version: str = ""


class LoadReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism.v1.load.<worker>`, four a second and on change.

    `memory_reserved_bytes` is what the worker has promised away (weights + KV quotas + fixed cost) of
    `memory_limit_bytes`; it never exceeds it. `element_bytes` is the size of a weight or KV element on
    this device, None for the checkpoint's own. `epoch` is the newest command epoch seen. A worker that is not
    `ready` takes commands, but starts engines only once it is (it still imports what they need).

    With several GPUs, memory is that of each, what is reserved that of the fullest, and
    `memory_reserved_by_gpu` that of all, in the order of `gpu_ids`. `profile` names what is known of the cost
    of such GPUs, empty for nothing. An `elastic` worker moves KV quotas between its models (not those of
    engines with several ranks); one that `freezes` takes FREEZE commands. `fixed_bytes` is what each engine
    takes of a GPU beside weights and KV cache, dozing ones too. `tp_sizes` are the numbers of GPUs that its
    engines can be spread over, empty for any. `commanded` names the models of all commands that it has not
    answered yet, those that wait for another included; None where it does not tell.
    """

    worker: str
    node: str
    device: str
    gpu_ids: list[int]
    memory_limit_bytes: int
    memory_reserved_bytes: int
    models: list[ModelLoad] = []
    element_bytes: int | None = None
    epoch: int = 0
    draining: bool = False
    ready: bool = True
    memory_reserved_by_gpu: list[int] = []
    profile: str = ""
    elastic: bool = False
    freezes: bool = False
    fixed_bytes: int = 0
    tp_sizes: list[int] = []
    commanded: list[str] | None = None


class ModelDemand(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one gateway sees of one model: requests parked, the longest wait among them, arrivals a second.
    `requests` and `prompt_tokens` count all that came since the gateway started."""

    model: str
    parked: int = 0
    oldest_parked_s: float = 0.0
    arrivals_per_s: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0


class DemandReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism.v1.demand.<gateway>`: every second, and at once when a request parks; only models in demand.
    One too large for a message comes in `parts`, of which this is `part`, from 0 (`demand_parts.py`)."""

    gateway: str
    models: list[ModelDemand] = []
    part: int = 0
    parts: int = 1
