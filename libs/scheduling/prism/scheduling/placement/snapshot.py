"""The cluster as a placement policy sees it, at one instant."""

from collections.abc import Mapping

import msgspec

from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import CommandKind
from prism.scheduling.cost import GpuProfile
from prism.scheduling.traffic import Traffic


class ResidentModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model on a worker as the worker reports it. Bytes are held on the device now, times in seconds:
    `idle_s` since a request was last queued or running, `state_s` since it came into its state.
    `active_bytes` is what it held when it was last seen active there, 0 if it never was.

    `gpu_ids` are those of the worker's GPUs that it is on, none for all of them. Of its KV quota, requests
    hold or will come to hold `kv_used_bytes`, and those here, queued ones included, would take
    `kv_wanted_bytes`. Prefill rate and the time of a decode step are as measured, None before that. One that
    is `outdated` has an engine of another version of the model than is registered: it serves nobody new, and
    leaves.
    """

    state: ModelState
    queued: int = 0
    running: int = 0
    weights_bytes: int = 0
    kv_quota_bytes: int = 0
    idle_s: float = 0.0
    state_s: float = 0.0
    active_bytes: int = 0
    gpu_ids: tuple[int, ...] = ()
    kv_used_bytes: int = 0
    kv_wanted_bytes: int = 0
    prefill_tokens_per_s: float | None = None
    decode_step_s: float | None = None
    outdated: bool = False

    @property
    def held_bytes(self) -> int:
        """Weights and KV quota: what dozing gives back."""
        return self.weights_bytes + self.kv_quota_bytes

    @property
    def busy(self) -> bool:
        """Whether a request is queued or running."""
        return self.queued + self.running > 0


class WorkerView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker that reports. Memory is bytes of each of its GPUs, what is reserved that of the fullest,
    unless `reserved_by_gpu` tells it of each; `gpu_ids` are cluster-wide. `profile` says what such a GPU can
    do, None when nobody knows. Where `elastic`, the worker moves KV quotas between its models: what they have
    above their floors can be had. A worker that `freezes` can take a dozing model off the GPU altogether.
    `fixed_bytes` is what it reserves for an engine beside weights and KV cache, None for what the profile
    says; `tp_sizes` are those that its engines can have, none for any."""

    id: str
    node: str
    device: str
    gpu_ids: tuple[int, ...]
    limit_bytes: int
    reserved_bytes: int
    element_bytes: int | None = None
    draining: bool = False
    ready: bool = True
    models: Mapping[str, ResidentModel] = {}
    reserved_by_gpu: Mapping[int, int] = {}
    profile: GpuProfile | None = None
    elastic: bool = False
    freezes: bool = False
    fixed_bytes: int | None = None
    tp_sizes: tuple[int, ...] = ()

    @property
    def outdated(self) -> list[str]:
        """The models that it has an engine of another version of than is registered."""
        return [name for name, model in self.models.items() if model.outdated]

    @property
    def context_bytes(self) -> int:
        """What an engine holds of a GPU beside weights and KV cache, awake or dozing."""
        if self.fixed_bytes is not None:
            return self.fixed_bytes
        return self.profile.context_bytes if self.profile is not None else 0


class ModelView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A registered model. `started`: a worker which is still there has had it running once. `removed`: it
    is not registered any more, but may still be resident somewhere. `traffic` is what it was asked for
    lately."""

    spec: ModelSpec
    facts: ModelFacts | None = None
    started: bool = False
    removed: bool = False
    traffic: Traffic = Traffic()


class Demand(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all gateways together see of a model: requests that are parked, how long the oldest of them has
    been, and for how long there have always been some, whether or not the same. Seconds."""

    parked: int = 0
    oldest_parked_s: float = 0.0
    parked_for_s: float = 0.0

    @property
    def waited_s(self) -> float:
        """How long the model has kept requests waiting. Clients that give up and ask again don't shorten
        it."""
        return max(self.oldest_parked_s, self.parked_for_s)


class InFlight(msgspec.Struct, frozen=True, omit_defaults=True):
    """A command without an outcome yet. `footprint_bytes` is what an activation will have reserved on each of
    the `gpu_ids`, none for all of the worker's."""

    worker: str
    model: str
    kind: CommandKind
    footprint_bytes: int = 0
    gpu_ids: tuple[int, ...] = ()


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model failed on a worker `count` times in a row; not to be tried there before `retry_at`, which is
    on the clock of `now`."""

    worker: str
    model: str
    count: int
    retry_at: float
    reason: str = ""


class ClusterSnapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that a plan depends on, besides the time. `models` is in the order of registration.
    `gone_gpus`: ids that a worker had and none that stays has now, with the seconds since. Without `balance`
    a plan only answers demand and puts right what is amiss; whoever plans often looks at balance every few
    seconds."""

    workers: tuple[WorkerView, ...] = ()
    models: Mapping[str, ModelView] = {}
    demand: Mapping[str, Demand] = {}
    in_flight: tuple[InFlight, ...] = ()
    failures: tuple[Failure, ...] = ()
    gone_gpus: Mapping[int, float] = {}
    balance: bool = True
