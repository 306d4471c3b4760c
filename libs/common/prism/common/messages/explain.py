"""How the global scheduler explains itself: the answer on `prism.v1.scheduler.plan`."""

import msgspec

from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind


class ExplainedAction(msgspec.Struct, frozen=True, omit_defaults=True):
    """A command decided `ago_s` seconds ago, and why. `outcome` is empty while there is none."""

    kind: CommandKind
    model: str
    worker: str
    reason: str
    ago_s: float
    outcome: str = ""


class ExplainedNote(msgspec.Struct, frozen=True):
    """Why a model is not where it should be."""

    model: str
    text: str


class ExplainedWorker(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker that reports, with the states of its models. Memory in bytes."""

    worker: str
    node: str
    gpu_ids: list[int]
    memory_limit_bytes: int
    memory_reserved_bytes: int
    models: dict[str, ModelState] = {}
    draining: bool = False


class ExplainedDemand(msgspec.Struct, frozen=True):
    """A model that requests wait for."""

    model: str
    parked: int
    oldest_parked_s: float


class PlanReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What `instance` sees and decided. `leader` names who leads, empty when nobody is known to; `epoch` is 0
    unless this instance leads. `actions` are the latest, newest last."""

    instance: str
    leader: str
    epoch: int
    policy: str
    models: int
    actions: list[ExplainedAction] = []
    notes: list[ExplainedNote] = []
    workers: list[ExplainedWorker] = []
    demand: list[ExplainedDemand] = []
