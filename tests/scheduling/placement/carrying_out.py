"""A small cluster that carries out plans: commands take a while, memory is counted, promises are watched."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from prism.common.messages.models import ModelState, Tier
from prism.common.messages.placement import CommandKind
from prism.scheduling.cost import GpuProfile
from prism.scheduling.memory import kv_floor
from prism.scheduling.placement import PlacementPolicy
from prism.scheduling.placement.actions import Action, Activate, Doze, Freeze, Release
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    InFlight,
    ModelView,
    ResidentModel,
    WorkerView,
)
from prism.scheduling.traffic import Traffic

GB = 10**9
STEP_S = 0.5
WAKE_S = 1.0
CONTEXT = 1 * GB
H100 = GpuProfile(
    "h100",
    80 * GB,
    operations_per_s=5e14,
    memory_bytes_per_s=2.5e12,
    bus_bytes_per_s=5e10,
    context_bytes=CONTEXT,
    shell_s=0.5,
    wake_fixed_s=0.05,
)


@dataclass
class Held:
    """A model on a worker."""

    state: ModelState
    gpu_ids: tuple[int, ...]
    weights: int = 0
    kv: int = 0
    since: float = 0.0
    used: float = 0.0
    running: bool = False
    ends: float = 0.0


@dataclass
class Cluster:
    """Workers with GPUs by id. `running` models have requests wherever they are active."""

    policy: PlacementPolicy
    views: dict[str, ModelView]
    workers: dict[str, tuple[int, ...]]
    limit: int = 80 * GB
    elastic: bool = True
    freezes: bool = False
    profile: GpuProfile | None = H100
    now: float = 1000.0
    running: set[str] = field(default_factory=set)
    parked: dict[str, float] = field(default_factory=dict)
    held: dict[tuple[str, str], Held] = field(default_factory=dict)
    commands: dict[tuple[str, str], Action] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    log: list[Action] = field(default_factory=list)

    def used_bytes(self, worker: str, gpu: int) -> int:
        """What is reserved of one GPU."""
        context = self.profile.context_bytes if self.profile else 0
        with_engine = (ModelState.COLD, ModelState.STAGED, ModelState.FROZEN)
        return sum(
            held.weights + held.kv + (0 if held.state in with_engine else context)
            for (at, _), held in self.held.items()
            if at == worker and gpu in held.gpu_ids
        )

    def snapshot(self) -> ClusterSnapshot:
        """As a scheduler sees it."""
        views = []
        for name, gpus in self.workers.items():
            reserved = {gpu: self.used_bytes(name, gpu) for gpu in gpus}
            models = {
                model: ResidentModel(
                    held.state,
                    running=int(model in self.running and held.state is ModelState.ACTIVE),
                    weights_bytes=held.weights,
                    kv_quota_bytes=held.kv,
                    idle_s=0.0 if model in self.running else self.now - held.used,
                    state_s=self.now - held.since,
                    gpu_ids=held.gpu_ids,
                )
                for (at, model), held in self.held.items()
                if at == name
            }
            views.append(
                WorkerView(
                    name,
                    "node",
                    "cuda",
                    gpus,
                    self.limit,
                    max(reserved.values()),
                    models=models,
                    reserved_by_gpu=reserved,
                    profile=self.profile,
                    elastic=self.elastic,
                    freezes=self.freezes,
                )
            )
        flying = tuple(
            InFlight(worker, name, CommandKind.ACTIVATE, action.footprint_bytes, action.gpu_ids)
            if isinstance(action, Activate)
            else InFlight(worker, name, CommandKind.DOZE if isinstance(action, Doze) else CommandKind.RELEASE)
            for (worker, name), action in self.commands.items()
        )
        return ClusterSnapshot(
            tuple(views),
            {
                name: ModelView(view.spec, view.facts, name in self.started, traffic=view.traffic)
                for name, view in self.views.items()
            },
            {name: Demand(1, self.now - since) for name, since in self.parked.items()},
            flying,
        )

    def ask(self, names: Iterable[str]) -> None:
        """Requests come: they park unless the model is active."""
        for name in names:
            if not self.active(name):
                self.parked.setdefault(name, self.now)

    def active(self, name: str) -> list[str]:
        """The workers where a model serves."""
        return [
            worker
            for (worker, model), held in self.held.items()
            if model == name and held.state is ModelState.ACTIVE
        ]

    def step(self) -> list[Action]:
        """Time passes, commands end, a plan is made and begun."""
        self.now += STEP_S
        self._finish()
        snapshot = self.snapshot()
        plan = self.policy.plan(snapshot, self.now)
        assert plan == self.policy.plan(snapshot, self.now), "the same snapshot gives the same plan"
        for action in plan.actions:
            self._begin(action)
        return list(plan.actions)

    def settle(self, steps: int = 200, quiet: int = 12) -> int:
        """Steps until nothing happens for `quiet` of them; fails after `steps`."""
        still = 0
        for number in range(steps):
            acted = self.step()
            still = 0 if acted or self.commands else still + 1
            if still >= quiet:
                return number
        raise AssertionError(f"no rest in {steps} steps: {self.log[-6:]}")

    def _begin(self, action: Action) -> None:
        key = (action.worker, action.model)
        assert key not in self.commands, "one command at a time for a model on a worker"
        self.commands[key] = action
        self.log.append(action)
        view = self.views[action.model]
        match action:
            case Activate():
                self._activate(action, view)
            case Doze():
                held = self.held[key]
                assert held.state is ModelState.ACTIVE
                assert view.spec.minimum_tier is not Tier.ACTIVE or len(self.active(action.model)) > 1
                assert not view.spec.pin or len(self.active(action.model)) > 1, "pinned models stay"
                held.state, held.since, held.ends = ModelState.DRAINING, self.now, self.now + STEP_S
            case Freeze() | Release():
                assert self.held[key].state is ModelState.DOZING
                self.held[key].ends = self.now + STEP_S

    def _activate(self, action: Activate, view: ModelView) -> None:
        gpus = action.gpu_ids or self.workers[action.worker]
        assert set(gpus) <= set(self.workers[action.worker])
        assert len(set(gpus)) == view.spec.tp_size, (
            "as many different GPUs of one worker as it is spread over"
        )
        assert view.facts is not None
        weights = -(-2 * view.facts.parameters // view.spec.tp_size)
        held = self.held.setdefault((action.worker, action.model), Held(ModelState.COLD, tuple(gpus)))
        assert held.state in (ModelState.COLD, ModelState.STAGED, ModelState.DOZING, ModelState.FROZEN)
        if held.state in (ModelState.DOZING, ModelState.FROZEN):
            assert held.gpu_ids == tuple(gpus), "an engine is bound to its GPUs"
        held.state, held.gpu_ids, held.since = ModelState.WAKING, tuple(gpus), self.now
        held.weights, held.kv, held.ends = weights, action.kv_bytes, self.now + WAKE_S
        if self.elastic:
            self._shrink_others(action.worker, action.model, gpus)
        for gpu in gpus:
            assert self.used_bytes(action.worker, gpu) <= self.limit, "it is only planned where it fits now"

    def _shrink_others(self, worker: str, model: str, gpus: Iterable[int]) -> None:
        for gpu in gpus:
            for (at, name), held in self.held.items():
                excess = self.used_bytes(worker, gpu) - self.limit
                if excess > 0 and at == worker and name != model and gpu in held.gpu_ids and held.kv:
                    view = self.views[name]
                    assert view.facts is not None
                    held.kv = max(min(held.kv, kv_floor(view.spec, view.facts, None)), held.kv - excess)

    def _finish(self) -> None:
        for (worker, name), action in list(self.commands.items()):
            held = self.held[worker, name]
            if self.now < held.ends:
                continue
            del self.commands[worker, name]
            held.since = self.now
            match action:
                case Activate():
                    held.state, held.used = ModelState.ACTIVE, self.now
                    self.started.add(name)
                    self.parked.pop(name, None)
                case Doze():
                    held.state, held.weights, held.kv = ModelState.DOZING, 0, 0
                    if name in self.running and not self.active(name):
                        self.parked.setdefault(name, self.now)
                case Freeze():
                    held.state = ModelState.FROZEN
                case Release():
                    held.state = ModelState.STAGED


def traffic(rate: float, prompt: float = 300.0, output: float = 200.0, last_s: float = 0.5) -> Traffic:
    """So many requests a second of so many tokens."""
    return Traffic(rate, rate * prompt, rate * output, last_s, 1.0 / rate if rate else None)
