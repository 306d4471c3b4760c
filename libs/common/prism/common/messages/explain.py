"""How the global scheduler explains itself: on `prism.v1.scheduler.plan` and `prism.v1.scheduler.explain`."""

import msgspec

from prism.common.errors import ErrorBody
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


class ExplainRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism.v1.scheduler.explain`: why `model` is where it is; all models in brief if it is empty. With
    `obstacles` instead: which models no request would wake as things are."""

    model: str = ""
    obstacles: bool = False


class ExplainedPlace(msgspec.Struct, frozen=True, omit_defaults=True):
    """One place that a model is at or could be at. `verdict` is one of here, coming, chosen, rejected, and
    `why` says it in words.

    Pressure is the worse of KV cache and compute, 1 for as much as the GPU can bear: now, and with the model
    (`pressure_with`). `seconds` is what the policy weighs places by, if it does: what requests would probably
    wait. `sleeps` names the models that would have to sleep for it. Bytes of each GPU.
    """

    worker: str
    gpu_ids: list[int]
    verdict: str
    why: str
    pressure: float = 0.0
    pressure_with: float = 0.0
    seconds: float | None = None
    ready_s: float = 0.0
    free_bytes: int = 0
    need_bytes: int = 0
    sleeps: list[str] = []


class ModelExplanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a model is where it is, by the policy's own functions on what the scheduler sees now.

    What went into it: requests parked and the longest wait, rates per second over the last minute, seconds
    since the last request (None: none was seen), its chance to return within the next half minute. `next` is
    what the plan does with it now, in words, `decided` what was decided lately, newest last.
    """

    model: str
    summary: str
    parked: int = 0
    oldest_parked_s: float = 0.0
    arrivals_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    last_arrival_s: float | None = None
    chance_to_return: float = 0.0
    next: list[str] = []
    notes: list[str] = []
    places: list[ExplainedPlace] = []
    decided: list[ExplainedAction] = []


class ExplainReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to an ExplainRequest, by the instance that leads. `error` is set for an unknown model.
    `obstacles` says of models that no request would wake what stands in the way; of others, also of those
    beyond the thousandth, nothing is known."""

    instance: str
    policy: str
    models: list[ModelExplanation] = []
    error: ErrorBody | None = None
    obstacles: list[ExplainedNote] = []
