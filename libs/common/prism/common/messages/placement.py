"""Commands of the global scheduler to a worker, their outcomes, and the routes that workers publish."""

import enum

import msgspec

from prism.common.errors import ErrorBody
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState


class CommandKind(enum.StrEnum):
    """What a worker can be told to do with a model."""

    ACTIVATE = "activate"
    DOZE = "doze"
    FREEZE = "freeze"
    RELEASE = "release"


class Command(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism.v1.command.<worker>`, answered by a `CommandOutcome` when the outcome is known.

    `epoch` fences: a worker refuses any that is older than one it has seen. `deadline_s` bounds the
    transition; `drain_s` is how long requests in flight may take to finish before it begins.
    `kv_bytes` is the KV-cache quota to activate with, on those of the worker's GPUs that `gpu_ids` names,
    none for all. Each engine of today's workers is on all GPUs of its worker, so these do not read `gpu_ids`.
    """

    kind: CommandKind
    epoch: int
    spec: ModelSpec
    facts: ModelFacts
    deadline_s: float
    drain_s: float = 0.0
    kv_bytes: int = 0
    gpu_ids: list[int] = []


class CommandOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a command led to: the `state` reached, with `error` set when it is not the one asked for.

    `seconds` holds the time of each phase (for example stage, start, copy, drain, total).
    """

    worker: str
    model: str
    state: ModelState
    error: ErrorBody | None = None
    seconds: dict[str, float] = {}


class Route(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism_routes`, key `<model>.<worker>`: this worker serves this model now. Gone when it does not."""

    model: str
    worker: str
    node: str


class LeaderRecord(msgspec.Struct, frozen=True):
    """`prism_leader`, key `global_scheduler`: who leads. The epoch is the revision that acquired it."""

    instance: str


class GpuIdClaim(msgspec.Struct, frozen=True):
    """`prism_gpu_ids`, key `<gpu id>`: the worker whose GPU has this id in the cluster. Expires with it."""

    worker: str
    node: str
