"""The shell around a placement policy, in simulated time: snapshots in, actions out, as global scheduler and
workers do it together."""

from collections import deque
from collections.abc import Callable, Sequence

from prism.bench.simulation.admission import AdmissionQueue
from prism.bench.simulation.engine import Engine, Request
from prism.bench.simulation.events import EventQueue
from prism.bench.simulation.gpu import Gpu
from prism.bench.simulation.instance import Instance
from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.quotas import QuotaShell, kv_floor_bytes
from prism.common.messages.models import ModelState, Tier
from prism.common.messages.placement import CommandKind
from prism.scheduling.cost import GpuProfile
from prism.scheduling.placement import PlacementPolicy
from prism.scheduling.placement.actions import Action, Activate, Doze, Freeze, Release
from prism.scheduling.placement.backoff import BackoffTable
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    InFlight,
    ModelView,
    ResidentModel,
    WorkerView,
)
from prism.scheduling.traffic import TrafficWindow

SETTLING_ROUNDS = 8

_TIERS = {
    ModelState.DOZING: Tier.DOZING,
    ModelState.FROZEN: Tier.FROZEN,
    ModelState.STAGED: Tier.STAGED,
    ModelState.COLD: Tier.COLD,
}
"""The states that a model can be activated from."""


class SimulatedWorker:
    """One worker: its GPUs, and the instances it knows of by model."""

    __slots__ = ("gpus", "id", "instances")

    def __init__(self, id: str, gpus: Sequence[Gpu]) -> None:
        self.id = id
        self.gpus = {gpu.index: gpu for gpu in gpus}
        self.instances: dict[str, Instance] = {}


class PlacementShell:
    """Plans when asked to, and carries out what the plan says.

    `on_active(instance, now)` and `on_gone(requests, now)` tell the router of an instance that serves now,
    and of requests that have to go elsewhere.
    """

    def __init__(
        self,
        policy: PlacementPolicy,
        models: Sequence[SimulatedModel],
        workers: Sequence[SimulatedWorker],
        profile: GpuProfile,
        events: EventQueue,
        *,
        quotas: QuotaShell,
        queue_of: Callable[[Gpu], AdmissionQueue],
        on_active: Callable[[Instance, float], None],
        on_gone: Callable[[list[Request], float], None],
        parked: Sequence[deque[Request]],
        windows: Sequence[TrafficWindow],
        chunk_tokens: int,
        balance_interval_s: float = 5.0,
        staged: bool = True,
        freezes: bool = True,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.workers = {worker.id: worker for worker in workers}
        self.serving: list[list[Instance]] = [[] for _ in models]
        self.activations = [0] * len(models)
        self.migrations = [0] * len(models)
        self.plans = 0
        self._active_s = [0.0] * len(models)
        self._active_since: dict[tuple[str, str], float] = {}
        self.failed = 0
        self.notes: dict[str, str] = {}
        self.retracted = 0
        self._policy = policy
        self._profile = profile
        self._events = events
        self._quotas = quotas
        self._queue_of = queue_of
        self._on_active = on_active
        self._on_gone = on_gone
        self._parked = parked
        self._windows = windows
        self._chunk_tokens = chunk_tokens
        self._freezes = freezes
        self._balance_interval_s = balance_interval_s
        self._balanced_at = -balance_interval_s
        self._host_tier = ModelState.STAGED if staged else ModelState.COLD
        self._in_flight: dict[tuple[str, str], InFlight] = {}
        self._backoff = BackoffTable()
        self._started: set[str] = set()
        self._instant = False
        self._planned_for = -1.0
        self._drains: dict[tuple[str, str], tuple[Instance, bool]] = {}

    def settle(self) -> None:
        """Have the initial placement in place before the trace begins."""
        self._instant = True
        for _ in range(SETTLING_ROUNDS + 2 * len(self.models)):
            self._balanced_at = -self._balance_interval_s
            if not self.plan(0.0):
                break
        self._instant = False
        self.activations = [0] * len(self.activations)
        self.migrations = [0] * len(self.migrations)

    def active_gpu_s(self, now: float) -> list[float]:
        """Seconds that each model was active, times its GPUs, until `now`."""
        total = list(self._active_s)
        for (worker, name), since in self._active_since.items():
            model = self.models[name]
            total[model.index] += (now - since) * len(self.workers[worker].instances[name].gpus)
        return total

    def plan_soon(self, now: float) -> None:
        """Plan at this instant, once, after all that happens at it."""
        if self._planned_for < now:
            self._planned_for = now
            self._events.at(now, self.plan)

    def plan(self, now: float) -> int:
        """Plan and carry out; how many actions there were."""
        self.plans += 1
        plan = self._policy.plan(self.snapshot(now), now)
        for note in plan.notes:
            self.notes[note.model] = note.text
        for action in plan.actions:
            self._carry_out(action, now)
        return len(plan.actions)

    def snapshot(self, now: float) -> ClusterSnapshot:
        """The cluster as the policy sees it now; time to look at balance every `balance_interval_s`."""
        balance = now - self._balanced_at >= self._balance_interval_s
        if balance:
            self._balanced_at = now
        demand: dict[str, Demand] = {}
        views: dict[str, ModelView] = {}
        for name, model in self.models.items():
            traffic = self._windows[model.index].at(now)
            views[name] = ModelView(model.spec, model.facts, name in self._started, False, traffic)
            parked = self._parked[model.index]
            if parked:
                oldest_s = now - parked[0].arrival_s
                demand[name] = Demand(len(parked), oldest_s, oldest_s)
        return ClusterSnapshot(
            tuple(self._view(worker, now) for worker in self.workers.values()),
            views,
            demand,
            tuple(self._in_flight.values()),
            self._backoff.failures(),
            balance=balance,
        )

    def _view(self, worker: SimulatedWorker, now: float) -> WorkerView:
        gpus = worker.gpus
        several = len(gpus) > 1
        by_gpu = {index: gpu.reserved_bytes for index, gpu in gpus.items()}
        return WorkerView(
            id=worker.id,
            node=worker.id,
            device="simulated",
            gpu_ids=tuple(gpus),
            limit_bytes=next(iter(gpus.values())).limit_bytes,
            reserved_bytes=max(by_gpu.values()),
            models={name: _resident(instance, now) for name, instance in worker.instances.items()},
            reserved_by_gpu=by_gpu if several else {},
            profile=self._profile,
            elastic=self._quotas.elastic,
            freezes=self._freezes,
        )

    def _carry_out(self, action: Action, now: float) -> None:
        if isinstance(action, Activate):
            self._activate(action, now)
        elif isinstance(action, Doze):
            self._put_away(action, action.drain_s, now, doze=True)
        elif isinstance(action, Freeze):
            self._freeze(action, now)
        elif isinstance(action, Release):
            self._put_away(action, 0.0, now, doze=False)

    def _activate(self, action: Activate, now: float) -> None:
        model, worker = self.models[action.model], self.workers[action.worker]
        instance = worker.instances.get(action.model)
        if instance is None:
            instance = worker.instances[action.model] = Instance(model, worker.id, self._host_tier)
        gpus = self._gpus(action, worker, instance)
        if instance.state not in _TIERS:
            self._fail(action, f"it is {instance.state}", now)
            return
        if len(gpus) < model.spec.tp_size:
            self._fail(action, f"{worker.id} has {len(worker.gpus)} GPUs", now)
            return
        if instance.state in (ModelState.DOZING, ModelState.FROZEN) and instance.gpus != gpus:
            # Its process can't move to other GPUs.
            instance.hold(weights=0, quota=0, context=0)
            instance.enter(self._host_tier, now)
        cost = model.cost
        instance.gpus = gpus
        before = _TIERS[instance.state]
        held = instance.context_bytes
        kv_bytes = self._quotas.make_room(model, gpus, action.kv_bytes, now, held=held)
        if kv_bytes < min(action.kv_bytes, kv_floor_bytes(model)):
            self._fail(action, f"out of memory on {worker.id}", now)
            return
        instance.hold(weights=cost.weights_bytes, quota=kv_bytes, context=cost.context_bytes)
        instance.active_bytes = cost.weights_bytes + kv_bytes
        waking = before in (Tier.DOZING, Tier.FROZEN)
        instance.enter(ModelState.WAKING if waking else ModelState.STARTING, now)
        key = (worker.id, action.model)
        self._in_flight[key] = InFlight(
            worker.id,
            action.model,
            CommandKind.ACTIVATE,
            action.footprint_bytes,
            tuple(gpu.index for gpu in gpus),
        )
        if self._instant:
            self._activated(instance, now)
            return
        # What comes before the copy goes on beside others' copies; the copies come one after the other.
        ahead = cost.ready_s(before) - cost.wake_s
        done = max(now + ahead, *(gpu.bus_free_s for gpu in gpus)) + cost.wake_s
        for gpu in gpus:
            gpu.bus_free_s = done
        self._events.at(done, lambda then: self._activated(instance, then))

    def _gpus(self, action: Activate, worker: SimulatedWorker, instance: Instance) -> tuple[Gpu, ...]:
        tp_size = self.models[action.model].spec.tp_size
        if action.gpu_ids:
            return tuple(worker.gpus[index] for index in action.gpu_ids if index in worker.gpus)
        if instance.state in (ModelState.DOZING, ModelState.FROZEN):
            return instance.gpus
        freest = sorted(worker.gpus.values(), key=lambda gpu: (-gpu.free_bytes, gpu.index))
        return tuple(freest[:tp_size])

    def _activated(self, instance: Instance, now: float) -> None:
        model = instance.model
        self._in_flight.pop((instance.worker, model.name), None)
        self._started.add(model.name)
        self._backoff.works(instance.worker, model.name)
        instance.enter(ModelState.ACTIVE, now)
        instance.idle_since = now
        instance.running = instance.reserved = 0
        engine = Engine(
            instance.gpus,
            model.cost,
            self._events,
            quota_tokens=instance.quota_tokens,
            chunk_tokens=self._chunk_tokens,
        )
        engine.owner = instance
        instance.engine = engine
        instance.queue = self._queue_of(instance.gpus[0])
        instance.queue.instances[model.name] = instance
        for gpu in instance.gpus:
            gpu.hold(now)
        self._active_since[instance.worker, model.name] = now
        self.serving[model.index].append(instance)
        self.activations[model.index] += 1
        self._on_active(instance, now)
        if not self._instant:
            self.plan_soon(now)

    def _put_away(self, action: Doze | Release, drain_s: float, now: float, *, doze: bool) -> None:
        worker = self.workers[action.worker]
        instance = worker.instances.get(action.model)
        if instance is None:
            return
        key = (worker.id, action.model)
        if instance.state is ModelState.ACTIVE:
            kind = CommandKind.DOZE if doze else CommandKind.RELEASE
            self._in_flight[key] = InFlight(worker.id, action.model, kind)
            serving = self.serving[instance.model.index]
            serving.remove(instance)
            if serving:
                self.migrations[instance.model.index] += 1
            instance.enter(ModelState.DRAINING, now)
            assert instance.queue is not None
            del instance.queue.instances[action.model]
            moved = instance.queue.take_out(instance)
            self._drains[key] = (instance, doze)
            if instance.running == 0:
                self.drained(instance, now)
            else:
                self._events.at(now + drain_s, lambda then: self._out_of_time(instance, then))
            if moved:
                self._on_gone(moved, now)
            return
        if instance.state in (ModelState.DOZING, ModelState.FROZEN) and not doze:
            instance.hold(weights=0, quota=0, context=0)
            instance.enter(self._host_tier, now)
            return
        self._fail(action, f"it is {instance.state}, not active", now)

    def _out_of_time(self, instance: Instance, now: float) -> None:
        """What is left after the drain goes on elsewhere, by replay of its tokens."""
        if (instance.worker, instance.model.name) not in self._drains or instance.running == 0:
            return
        assert instance.engine is not None
        assert instance.queue is not None
        prefilling = [*instance.engine.batch, *instance.engine.waiting]
        moved = instance.engine.take_out(now)
        instance.running = instance.reserved = 0
        instance.queue.prefilled(prefilling, now)
        self.drained(instance, now)
        self._on_gone(moved, now)

    def drained(self, instance: Instance, now: float) -> None:
        """No request is left at an instance that is draining."""
        entry = self._drains.pop((instance.worker, instance.model.name), None)
        if entry is None:
            return
        doze = entry[1]
        if doze:
            self._events.at(now + instance.model.cost.doze_s, lambda then: self._asleep(instance, then, doze))
        else:
            self._asleep(instance, now, doze)

    def _asleep(self, instance: Instance, now: float, doze: bool) -> None:
        assert instance.engine is not None
        self.retracted += instance.engine.retracted
        instance.engine = None
        instance.queue = None
        for gpu in instance.gpus:
            gpu.let_go(now)
        since = self._active_since.pop((instance.worker, instance.model.name))
        self._active_s[instance.model.index] += (now - since) * len(instance.gpus)
        instance.hold(weights=0, quota=0, context=instance.context_bytes if doze else 0)
        instance.enter(ModelState.DOZING if doze else self._host_tier, now)
        self._in_flight.pop((instance.worker, instance.model.name), None)
        self.plan_soon(now)

    def _freeze(self, action: Freeze, now: float) -> None:
        worker = self.workers[action.worker]
        instance = worker.instances.get(action.model)
        if instance is None or instance.state is not ModelState.DOZING:
            self._fail(action, "it does not doze", now)
            return
        key = (worker.id, action.model)
        self._in_flight[key] = InFlight(worker.id, action.model, CommandKind.FREEZE)

        def frozen(then: float) -> None:
            instance.hold(weights=0, quota=0, context=0)
            instance.enter(ModelState.FROZEN, then)
            self._in_flight.pop(key, None)
            self.plan_soon(then)

        self._events.at(now + self._profile.freeze_s, frozen)

    def _fail(self, action: Action, why: str, now: float) -> None:
        self.failed += 1
        failure = self._backoff.failed(action.worker, action.model, why, now)
        self._events.at(failure.retry_at, lambda then: self.plan_soon(then))


def _resident(instance: Instance, now: float) -> ResidentModel:
    engine = instance.engine
    if engine is None:
        return ResidentModel(
            instance.state,
            weights_bytes=instance.weights_bytes,
            kv_quota_bytes=instance.quota_bytes,
            idle_s=now - instance.idle_since,
            state_s=now - instance.state_at,
            active_bytes=instance.active_bytes,
            gpu_ids=tuple(gpu.index for gpu in instance.gpus),
        )
    return ResidentModel(
        instance.state,
        instance.queued,
        instance.running,
        instance.weights_bytes,
        instance.quota_bytes,
        0.0 if instance.load else now - instance.idle_since,
        now - instance.state_at,
        instance.active_bytes,
        tuple(gpu.index for gpu in instance.gpus),
        instance.used_bytes,
        instance.wanted_bytes,
        1.0 / (engine.prefill_token_s * engine.slowdown),
        engine.step_s * engine.share if engine.ends else None,
    )
