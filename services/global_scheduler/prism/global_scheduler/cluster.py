"""What the global scheduler knows, from reports alone: a new leader knows as much after one round of them."""

from collections import defaultdict
from collections.abc import Mapping

import msgspec

from prism.common import subjects
from prism.common.messages.load import DemandReport, LoadReport, ModelLoad
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState, same_version
from prism.common.messages.placement import CommandKind
from prism.global_scheduler.traffic import TrafficWatch
from prism.scheduling.cost import GpuProfile
from prism.scheduling.placement.backoff import LONGEST_S, BackoffTable
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Demand,
    InFlight,
    ModelView,
    ResidentModel,
    WorkerView,
)
from prism.scheduling.profiles import shipped_profiles

WORKER_SILENT_S = 2.5
GATEWAY_SILENT_S = 3.5
BREAK_S = 10.0
"""A model that no request is parked for may be asked for again within this time as if there always had been
one: clients give up and try again."""

_RAN = frozenset(
    {ModelState.ACTIVE, ModelState.DRAINING, ModelState.DOZING, ModelState.WAKING, ModelState.FROZEN}
)
_SETTLED = frozenset({ModelState.ACTIVE, ModelState.DOZING, ModelState.FROZEN})
_NOT_RESIDENT = frozenset({ModelState.COLD, ModelState.STAGED})


class SeenWorker(msgspec.Struct):
    """A worker's latest report, when it came, and what is remembered of its models while it is there."""

    report: LoadReport
    seen_at: float
    started: set[str] = msgspec.field(default_factory=set)
    active_bytes: dict[str, int] = msgspec.field(default_factory=dict)


class ParkedSpell(msgspec.Struct):
    """Since when requests for a model have been parked, and when one last was."""

    since: float
    seen_at: float


class ClusterState:
    """Latest reports, registered models and failures. `now` is a monotonic time in seconds throughout.
    `profiles` says by name what kinds of GPU can do; without it, those that come with Prism."""

    def __init__(self, profiles: Mapping[str, GpuProfile] | None = None) -> None:
        self._profiles = shipped_profiles() if profiles is None else profiles
        self._traffic = TrafficWatch()
        self.workers: dict[str, SeenWorker] = {}
        self.backoff = BackoffTable()
        self._gateways: dict[str, tuple[DemandReport, float]] = {}
        self._specs: dict[str, ModelSpec] = {}
        self._facts: dict[str, ModelFacts] = {}
        self._versions: dict[str, str] = {}
        self._removed: dict[str, ModelSpec] = {}
        self._gpu_seen_at: dict[int, float] = {}
        self._parked: dict[str, ParkedSpell] = {}

    def set_spec(self, key: str, spec: ModelSpec | None) -> None:
        """The registry's entry `key` is `spec` now, None for gone."""
        if spec is not None:
            self._specs[key] = spec
            self._removed.pop(spec.model_name, None)
        elif (gone := self._specs.pop(key, None)) is not None:
            self._removed[gone.model_name] = gone

    def spec(self, model: str) -> ModelSpec | None:
        """The registered spec of `model`."""
        return next((spec for spec in self._specs.values() if spec.model_name == model), None)

    def set_facts(self, key: str, facts: ModelFacts | None) -> None:
        """What a model store found in a model's folder, None for gone."""
        if facts is not None:
            self._facts[key] = facts
            if facts.version and self._versions.get(facts.model, facts.version) != facts.version:
                self._forget_experience(facts.model)
            self._versions[facts.model] = facts.version or self._versions.get(facts.model, "")
        elif key in self._facts:
            del self._facts[key]

    def _forget_experience(self, model: str) -> None:
        """What another version of `model` took, and where it failed or ran, says nothing of this one."""
        for worker, seen in self.workers.items():
            seen.active_bytes.pop(model, None)
            seen.started.discard(model)
            self.backoff.works(worker, model)

    def load(self, report: LoadReport, now: float) -> bool:
        """Take a worker's report. Whether it tells anything that could change a plan."""
        seen = self.workers.get(report.worker)
        before = {model.model: model for model in seen.report.models} if seen else {}
        changed = seen is None or _gist(seen.report) != _gist(report)
        if seen is None:
            seen = self.workers[report.worker] = SeenWorker(report, now)
        seen.report, seen.seen_at = report, now
        self._traffic.load(report, now)
        if not report.draining:
            self._gpu_seen_at.update(dict.fromkeys(report.gpu_ids, now))
        for model in report.models:
            self._learn(seen, model, before.get(model.model), now)
        return changed

    def _learn(self, seen: SeenWorker, model: ModelLoad, before: ModelLoad | None, now: float) -> None:
        worker, name = seen.report.worker, model.model
        if not same_version(model.version, self._versions.get(name, "")):
            return
        if model.state in _RAN:
            seen.started.add(name)
        if model.state is ModelState.ACTIVE:
            self._parked.pop(name, None)
            seen.active_bytes[name] = model.weights_bytes + model.kv_quota_bytes
            if model.state_s >= LONGEST_S:
                self.backoff.works(worker, name)
        elif (
            model.state is ModelState.FAILED
            and before is not None
            and before.state is ModelState.ACTIVE
            and same_version(before.version, self._versions.get(name, ""))
        ):
            # Failures on the way up are told by the outcome of the command.
            self.backoff.failed(worker, name, model.failure or "its engine ended", now)

    def outdated(self) -> list[tuple[str, ModelSpec, ModelFacts]]:
        """Engines, awake or asleep, that were started for another version of their model than is registered
        now: their workers, and what is registered."""
        return [
            (worker, spec, facts)
            for worker, seen in sorted(self.workers.items())
            for model in seen.report.models
            if model.state in _SETTLED
            and (facts := self._facts.get(subjects.facts_key(model.model))) is not None
            and not same_version(model.version, facts.version)
            and (spec := self._specs.get(subjects.spec_key(model.model))) is not None
        ]

    def seen_epoch(self) -> int:
        """The highest epoch in which any worker has been commanded."""
        return max((seen.report.epoch for seen in self.workers.values()), default=0)

    def forgive(self, model: str) -> list[str]:
        """Start `model`'s failures anew; the workers that still remember one."""
        for worker in self.workers:
            self.backoff.works(worker, model)
        return sorted(
            worker
            for worker, seen in self.workers.items()
            for entry in seen.report.models
            if entry.model == model
            and (entry.state is ModelState.FAILED or (entry.state is ModelState.COLD and entry.failure))
        )

    def demand(self, report: DemandReport, now: float) -> None:
        """Take a gateway's report, which replaces its last one."""
        self._gateways[report.gateway] = (report, now)
        self._traffic.demand(report, now)
        for model in report.models:
            if not model.parked:
                continue
            spell = self._parked.get(model.model)
            if spell is None or now - spell.seen_at > BREAK_S:
                self._parked[model.model] = ParkedSpell(now - model.oldest_parked_s, now)
            else:
                spell.since = min(spell.since, now - model.oldest_parked_s)
                spell.seen_at = now

    def forget_silent(self, now: float) -> list[str]:
        """Drop workers and gateways not heard of for too long; returns the workers dropped."""
        lost = [name for name, seen in self.workers.items() if now - seen.seen_at > WORKER_SILENT_S]
        for name in lost:
            del self.workers[name]
            self.backoff.forget_worker(name)
            self._traffic.forget_worker(name)
        for name, (_, seen_at) in list(self._gateways.items()):
            if now - seen_at > GATEWAY_SILENT_S:
                del self._gateways[name]
                self._traffic.forget_gateway(name)
        for model, spell in list(self._parked.items()):
            if now - spell.seen_at > BREAK_S:
                del self._parked[model]
        return lost

    def snapshot(
        self, in_flight: tuple[InFlight, ...], now: float, *, balance: bool = True
    ) -> ClusterSnapshot:
        """All of it as of `now`: times in reports are aged by how long ago they came."""
        facts = {found.model: found for found in self._facts.values()}
        workers = tuple(
            _view(seen, self._profiles.get(seen.report.profile), facts, now)
            for _, seen in sorted(self.workers.items())
        )
        self._forget_released(workers)
        started = {name for seen in self.workers.values() for name in seen.started}
        models = {
            spec.model_name: ModelView(
                spec,
                facts.get(spec.model_name),
                spec.model_name in started,
                removed,
                self._traffic.at(spec.model_name, now),
            )
            for removed, specs in ((True, self._removed), (False, self._specs))
            for spec in specs.values()
        }
        return ClusterSnapshot(
            workers,
            models,
            self._demand(now),
            in_flight + _about_to_leave(workers, in_flight),
            self.backoff.failures(),
            self._gone_gpus(workers, now),
            balance,
        )

    def _gone_gpus(self, workers: tuple[WorkerView, ...], now: float) -> dict[int, float]:
        there = {gpu for worker in workers if not worker.draining for gpu in worker.gpu_ids}
        return {gpu: now - at for gpu, at in self._gpu_seen_at.items() if gpu not in there}

    def _forget_released(self, workers: tuple[WorkerView, ...]) -> None:
        if not self._removed:
            return
        resident = {
            name
            for worker in workers
            for name, model in worker.models.items()
            if model.state not in _NOT_RESIDENT
        }
        self._removed = {name: spec for name, spec in self._removed.items() if name in resident}

    def _demand(self, now: float) -> dict[str, Demand]:
        by_model: dict[str, list[Demand]] = defaultdict(list)
        for report, seen_at in self._gateways.values():
            for model in report.models:
                waited = model.oldest_parked_s + (now - seen_at) if model.parked else 0.0
                by_model[model.model].append(Demand(model.parked, waited))
        return {
            name: Demand(
                sum(demand.parked for demand in demands),
                max(demand.oldest_parked_s for demand in demands),
                self._parked_for_s(name, now) if any(demand.parked for demand in demands) else 0.0,
            )
            for name, demands in by_model.items()
        }

    def _parked_for_s(self, model: str, now: float) -> float:
        spell = self._parked.get(model)
        return now - spell.since if spell is not None else 0.0


def _about_to_leave(workers: tuple[WorkerView, ...], in_flight: tuple[InFlight, ...]) -> tuple[InFlight, ...]:
    """Outdated engines, as if their release were under way: where one is, none of the new version can be."""
    commanded = {(command.worker, command.model) for command in in_flight}
    return tuple(
        InFlight(worker.id, name, CommandKind.RELEASE)
        for worker in workers
        for name in worker.outdated
        if (worker.id, name) not in commanded
    )


def _gist(report: LoadReport) -> object:
    """What of a report matters at once: everything but counters and the passing of time."""
    models = {
        model.model: (
            model.state,
            model.queued + model.running > 0,
            model.weights_bytes,
            model.kv_quota_bytes,
        )
        for model in report.models
    }
    return (
        report.memory_limit_bytes,
        report.memory_reserved_bytes,
        report.draining,
        report.ready,
        report.gpu_ids,
        models,
    )


def _view(
    seen: SeenWorker, profile: GpuProfile | None, facts: Mapping[str, ModelFacts], now: float
) -> WorkerView:
    report, age = seen.report, now - seen.seen_at
    return WorkerView(
        id=report.worker,
        node=report.node,
        device=report.device,
        gpu_ids=tuple(report.gpu_ids),
        limit_bytes=report.memory_limit_bytes,
        reserved_bytes=report.memory_reserved_bytes,
        element_bytes=report.element_bytes,
        draining=report.draining,
        ready=report.ready,
        reserved_by_gpu=dict(zip(report.gpu_ids, report.memory_reserved_by_gpu, strict=False)),
        profile=profile,
        elastic=report.elastic,
        freezes=report.freezes,
        fixed_bytes=report.fixed_bytes,
        tp_sizes=tuple(report.tp_sizes),
        models={
            model.model: ResidentModel(
                state=model.state,
                queued=model.queued,
                running=model.running,
                weights_bytes=model.weights_bytes,
                kv_quota_bytes=model.kv_quota_bytes,
                idle_s=0.0 if model.queued + model.running else model.idle_s + age,
                state_s=model.state_s + age,
                active_bytes=seen.active_bytes.get(model.model, 0),
                gpu_ids=tuple(model.gpu_ids),
                kv_used_bytes=max(0, model.kv_quota_bytes - model.kv_spare_bytes),
                kv_wanted_bytes=model.kv_wanted_bytes,
                prefill_tokens_per_s=model.prefill_tokens_per_s,
                decode_step_s=model.decode_step_s,
                outdated=(found := facts.get(model.model)) is not None
                and not same_version(model.version, found.version),
            )
            for model in report.models
        },
    )
