"""The cluster while a plan is being made: each GPU's memory and work, and who is where."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement.pressure import NO_WORK, Company, Work, pressure_of, work_of
from prism.scheduling.placement.pricing import cost_on, sizes_on
from prism.scheduling.placement.snapshot import (
    ClusterSnapshot,
    Failure,
    ModelView,
    ResidentModel,
    WorkerView,
)

_LEAVING = frozenset({CommandKind.DOZE, CommandKind.FREEZE, CommandKind.RELEASE})
_RISING = frozenset({ModelState.STAGING, ModelState.STARTING, ModelState.WAKING})
_ASLEEP = frozenset({ModelState.DOZING, ModelState.FROZEN})
_HAS_ENGINE = frozenset(
    {ModelState.ACTIVE, ModelState.DOZING, ModelState.STARTING, ModelState.WAKING, ModelState.DRAINING}
)
ALL_PLACES = 64
"""Up to so many GPUs are all looked at for a model; of more, those that press least."""


class Gpu:
    """One GPU. Bytes: `free` now, less what activations under way will still take; `soon` and `late` come
    free when idle and busy models have left; `claimed` is kept for models that wait for it. `unreserved` is
    the part of `free` for which nobody must give up KV quota, `kv_space` what there is for KV cache beside
    weights and contexts."""

    __slots__ = (
        "claimed",
        "company",
        "compute",
        "free",
        "id",
        "instances",
        "kv_space",
        "kv_wanted",
        "late",
        "limit",
        "queued",
        "requests_per_s",
        "soon",
        "unreserved",
        "worker",
    )

    def __init__(self, worker: WorkerView, gpu_id: int) -> None:
        self.worker = worker
        self.id = gpu_id
        self.limit = worker.limit_bytes
        reserved = worker.reserved_by_gpu.get(gpu_id, worker.reserved_bytes)
        self.free = self.unreserved = self.kv_space = self.limit - reserved
        self.soon = self.late = self.claimed = self.queued = 0
        self.kv_wanted = self.compute = self.requests_per_s = 0.0
        self.company = Company()
        self.instances: list[Instance] = []

    @property
    def pressure(self) -> float:
        """The worse of its KV and its compute pressure."""
        return pressure_of(self.kv_wanted, self.kv_space, self.compute, self.company.strain)

    def with_work(self, work: Work, nbytes: int) -> float:
        """Its pressure with one more instance, whose weights and context take `nbytes`."""
        return pressure_of(
            self.kv_wanted + work.kv_bytes,
            self.kv_space - nbytes,
            self.compute + work.compute,
            self.company.strain_with(work),
        )

    def without_work(self, work: Work, nbytes: int) -> float:
        """Its pressure without an instance that it counts, whose weights take `nbytes`."""
        return pressure_of(
            self.kv_wanted - work.kv_bytes,
            self.kv_space + nbytes,
            self.compute - work.compute,
            self.company.strain_without(work),
        )

    def take(self, work: Work, nbytes: int) -> None:
        """Count an instance whose weights and context take `nbytes`."""
        self.kv_wanted += work.kv_bytes
        self.compute += work.compute
        self.requests_per_s += work.requests_per_s
        self.kv_space -= nbytes
        self.company.join(work)

    def lose(self, work: Work, nbytes: int) -> None:
        """The reverse of `take`."""
        self.kv_wanted -= work.kv_bytes
        self.compute -= work.compute
        self.requests_per_s -= work.requests_per_s
        self.kv_space += nbytes
        self.company.leave(work)


class Place(NamedTuple):
    """Where an instance may be: so many GPUs of one worker as it is spread over."""

    worker: WorkerView
    gpus: tuple[Gpu, ...]

    @property
    def gpu_ids(self) -> tuple[int, ...]:
        """As `Activate` names them: none for all GPUs of the worker."""
        return () if len(self.gpus) == len(self.worker.gpu_ids) else tuple(gpu.id for gpu in self.gpus)

    @property
    def pressure(self) -> float:
        """Of the GPU under most."""
        gpus = self.gpus
        return gpus[0].pressure if len(gpus) == 1 else max(gpu.pressure for gpu in gpus)


class Instance:
    """A model that holds, or is about to hold, memory of GPUs. `leaving` ones are being put to sleep."""

    __slots__ = ("leaving", "model", "place", "resident", "view", "work")

    def __init__(self, model: str, view: ModelView | None, place: Place, resident: ResidentModel) -> None:
        self.model = model
        self.view = view
        self.place = place
        self.resident = resident
        self.leaving = resident.state is ModelState.DRAINING
        self.work = NO_WORK

    @property
    def serves(self) -> bool:
        """Whether it is active and stays."""
        return self.resident.state is ModelState.ACTIVE and not self.leaving


class Board:
    """All of it, changed by a plan's own actions. `serving` are the instances of a model that are active,
    `rising` those on their way up, `asleep` those that doze or are frozen; none counts workers that drain."""

    def __init__(self, snapshot: ClusterSnapshot, now: float) -> None:
        self.snapshot = snapshot
        self.gpus: list[Gpu] = []
        self.places: dict[str, Place] = {}
        self.instances: dict[tuple[str, str], Instance] = {}
        self.serving: dict[str, list[Instance]] = defaultdict(list)
        self.rising: dict[str, list[Instance]] = defaultdict(list)
        self.asleep: dict[str, list[Instance]] = defaultdict(list)
        self.commanded: set[tuple[str, str]] = set()
        self.backing_off: dict[tuple[str, str], Failure] = {
            (failure.worker, failure.model): failure
            for failure in snapshot.failures
            if failure.retry_at > now
        }
        self._fronts: dict[object, _Front] = {}
        self._measured = False
        self._kinds: dict[tuple[int | None, bool], WorkerView] = {}
        for worker in snapshot.workers:
            if not worker.draining:
                gpus = tuple([Gpu(worker, gpu_id) for gpu_id in worker.gpu_ids])
                self.places[worker.id] = Place(worker, gpus)
                self.gpus += gpus
                self._kinds[worker.element_bytes, worker.elastic] = worker
        leaving = set()
        for command in snapshot.in_flight:
            self.commanded.add((command.worker, command.model))
            if command.kind in _LEAVING:
                leaving.add((command.worker, command.model))
        for place in self.places.values():
            self._add_residents(place, leaving)
        for command in snapshot.in_flight:
            if command.kind is CommandKind.ACTIVATE and command.worker in self.places:
                self._expect(command.worker, command.model, command.footprint_bytes, command.gpu_ids)

    def _add_residents(self, whole: Place, leaving: set[tuple[str, str]]) -> None:
        worker, models = whole.worker, self.snapshot.models
        for name, resident in worker.models.items():
            if (
                resident.state not in _HAS_ENGINE
                and resident.state not in _ASLEEP
                and not resident.held_bytes
            ):
                continue
            instance = Instance(name, models.get(name), self._on(whole, resident.gpu_ids), resident)
            instance.leaving = instance.leaving or (worker.id, name) in leaving
            self._add(instance)
            spare = self.spare_kv(instance)
            for gpu in instance.place.gpus:
                gpu.kv_space += resident.kv_quota_bytes
                gpu.free += 0 if instance.leaving else spare
                if instance.leaving:
                    gpu.kv_space += resident.weights_bytes
                    self._comes_free(gpu, instance)

    def _add(self, instance: Instance) -> None:
        self.instances[instance.place.worker.id, instance.model] = instance
        for gpu in instance.place.gpus:
            gpu.instances.append(instance)
            gpu.queued += instance.resident.queued
        if instance.serves:
            self.serving[instance.model].append(instance)
        elif instance.resident.state in _RISING and not instance.leaving:
            self.rising[instance.model].append(instance)
        elif instance.resident.state in _ASLEEP and not instance.leaving:
            self.asleep[instance.model].append(instance)

    def _expect(self, worker: str, model: str, footprint_bytes: int, gpu_ids: tuple[int, ...]) -> None:
        """An activation is under way: what it has not reserved yet is not free, and its work will come."""
        here = self.instances.get((worker, model))
        held = here.resident.held_bytes if here is not None else 0
        place = self._on(self.places[worker], gpu_ids)
        for gpu in place.gpus:
            gpu.free -= max(0, footprint_bytes - held)
            gpu.unreserved -= max(0, footprint_bytes - held)
        if here is not None and (here.serves or here.resident.state in _RISING):
            return
        view = self.snapshot.models.get(model)
        rising = Instance(model, view, place, ResidentModel(ModelState.WAKING))
        if here is not None:
            for gpu in here.place.gpus:
                gpu.instances.remove(here)
        self._add(rising)
        if view is not None and view.facts is not None:
            missing = sizes_on(view, place.worker).weights
            for gpu in place.gpus:
                gpu.kv_space -= missing

    @staticmethod
    def _on(whole: Place, gpu_ids: tuple[int, ...]) -> Place:
        if not gpu_ids or len(whole.gpus) == 1:
            return whole
        return Place(whole.worker, tuple([gpu for gpu in whole.gpus if gpu.id in gpu_ids]))

    def measure(self) -> None:
        """Count everybody's work; once is enough, and only those who look at pressure need it."""
        if self._measured:
            return
        self._measured = True
        for by_model in (self.serving, self.rising):
            for name, instances in by_model.items():
                view = self.snapshot.models.get(name)
                if view is None or not instances:
                    continue
                share = 1.0 / (len(self.serving.get(name, ())) + len(self.rising.get(name, ())))
                for instance in instances:
                    worker = instance.place.worker
                    instance.work = work_of(view, cost_on(view, worker), instance.resident, share)
                    for gpu in instance.place.gpus:
                        gpu.take(instance.work, 0)

    def spare_kv(self, instance: Instance) -> int:
        """KV quota above its floor and above what requests hold: an elastic worker gives it to others."""
        view, worker, resident = instance.view, instance.place.worker, instance.resident
        if not worker.elastic or not resident.kv_quota_bytes or view is None or view.facts is None:
            return 0
        floor = sizes_on(view, worker).kv_floor
        return max(0, resident.kv_quota_bytes - max(floor, resident.kv_used_bytes))

    def freed_bytes(self, instance: Instance) -> int:
        """What becomes free on each of its GPUs when an active one dozes, beyond what counts as free now."""
        return instance.resident.held_bytes - self.spare_kv(instance)

    def fixed_bytes(self, view: ModelView, worker: WorkerView) -> int:
        """Weights, and a context where it has none there yet: what an activation takes besides KV cache."""
        here = worker.models.get(view.spec.model_name)
        context = 0 if here is not None and here.state in _HAS_ENGINE else worker.context_bytes
        return sizes_on(view, worker).weights + context

    def need(self, view: ModelView, worker: WorkerView) -> int:
        """Bytes of each GPU that must be free for an activation there, beyond what it holds there."""
        here = worker.models.get(view.spec.model_name)
        takes = self.fixed_bytes(view, worker) + self.kv_at_least(view, worker)
        if here is None:
            return takes
        if not (worker.elastic and view.spec.tp_size == 1):
            takes = max(takes, here.active_bytes)
        return max(0, takes - here.held_bytes)

    def least_need(self, view: ModelView) -> int:
        """A lower bound of what an activation takes of each GPU, wherever it goes."""
        kinds = self._kinds.values()
        return min(
            (sizes_on(view, worker).weights + self.kv_at_least(view, worker) for worker in kinds), default=0
        )

    @staticmethod
    def kv_at_least(view: ModelView, worker: WorkerView) -> int:
        """The KV quota that an activation there must get: the floor where quotas move, else all of it."""
        sizes = sizes_on(view, worker)
        return sizes.kv_floor if worker.elastic else sizes.kv_reservation

    def could_ever_fit(self, view: ModelView, worker: WorkerView) -> bool:
        """Whether it fits into GPUs of that worker that hold nothing else."""
        here = worker.models.get(view.spec.model_name)
        takes = sizes_on(view, worker).weights + self.kv_at_least(view, worker)
        if not worker.elastic and here is not None:
            takes = max(takes, here.active_bytes)
        return takes + worker.context_bytes <= worker.limit_bytes

    def places_for(
        self, view: ModelView, rank: Callable[[Gpu], float], fits: Callable[[Place], bool]
    ) -> Iterator[Place]:
        """Places for an instance, anti-affine: its GPUs differ and are of one worker. All of them in a small
        cluster; in a large one those of least `rank` that fit, some that don't, and where it sleeps.
        """
        tp_size = view.spec.tp_size
        if len(self.gpus) <= ALL_PLACES:
            for whole in self.places.values():
                yield from self.places_within(whole, tp_size, rank)
            return
        front = self._fronts.get((rank, tp_size))
        if front is None:
            wholes = (whole for whole in self.places.values() if len(whole.gpus) >= tp_size)
            places = [place for whole in wholes for place in self.places_within(whole, tp_size, rank)]
            front = self._fronts[rank, tp_size] = _Front(places, rank)
        near = front.nearest(fits)
        yield from near
        if asleep := self.asleep.get(view.spec.model_name):
            seen = {place.gpus for place in near}
            yield from (one.place for one in asleep if one.place.gpus not in seen)

    @staticmethod
    def places_within(whole: Place, tp_size: int, rank: Callable[[Gpu], float]) -> list[Place]:
        """The groups of `tp_size` GPUs of one worker to look at: aligned ones, which leave no odd GPU over,
        and the one of least rank."""
        gpus = whole.gpus
        if len(gpus) == tp_size:
            return [whole]
        if tp_size == 1:
            return [Place(whole.worker, (gpu,)) for gpu in gpus]
        if len(gpus) < tp_size:
            return []
        groups = [gpus[at : at + tp_size] for at in range(0, len(gpus) - tp_size + 1, tp_size)]
        best = tuple(sorted(gpus, key=lambda gpu: (rank(gpu), -gpu.free, gpu.id))[:tp_size])
        if best not in groups:
            groups.append(best)
        return [Place(whole.worker, group) for group in groups]

    def bound(self, name: str, worker: WorkerView) -> frozenset[int] | None:
        """The GPUs that a model's engine there is bound to, None when it has no engine there."""
        here = worker.models.get(name)
        if here is None or not (here.state in _HAS_ENGINE or here.state is ModelState.FROZEN):
            return None
        return frozenset(here.gpu_ids or worker.gpu_ids)

    def activate(self, view: ModelView, place: Place, need: int, work: Work) -> None:
        """A model takes `need` bytes that are free, on its way up."""
        name = view.spec.model_name
        self.commanded.add((place.worker.id, name))
        fixed = self.fixed_bytes(view, place.worker)
        for gpu in place.gpus:
            gpu.free -= need
            gpu.unreserved -= need
            gpu.take(work, fixed)

    def doze(self, instance: Instance) -> None:
        """An active one starts to leave."""
        self._leaves(instance)
        if instance in self.serving[instance.model]:
            self.serving[instance.model].remove(instance)
        for gpu in instance.place.gpus:
            self._comes_free(gpu, instance, beyond=self.spare_kv(instance))
            gpu.lose(instance.work, instance.resident.weights_bytes)

    def shed(self, instance: Instance, nbytes: int) -> None:
        """A dozing one starts to give back its context of `nbytes`."""
        self._leaves(instance)
        for gpu in instance.place.gpus:
            gpu.soon += nbytes

    def _leaves(self, instance: Instance) -> None:
        self.commanded.add((instance.place.worker.id, instance.model))
        instance.leaving = True

    @staticmethod
    def _comes_free(gpu: Gpu, instance: Instance, beyond: int = 0) -> None:
        nbytes = instance.resident.held_bytes - beyond
        if instance.resident.busy:
            gpu.late += nbytes
        else:
            gpu.soon += nbytes


class _Front:
    """Places by rank, kept as a heap whose entries are renewed when they come up and have changed."""

    def __init__(self, places: list[Place], rank: Callable[[Gpu], float]) -> None:
        self._rank = rank
        self._heap = [(self._of(place), number, place) for number, place in enumerate(places)]
        heapq.heapify(self._heap)

    def _of(self, place: Place) -> float:
        gpus = place.gpus
        return self._rank(gpus[0]) if len(gpus) == 1 else max(self._rank(gpu) for gpu in gpus)

    def nearest(
        self, fits: Callable[[Place], bool], enough: int = 8, unfit: int = 8, most: int = 24
    ) -> list[Place]:
        """Those of least rank: `enough` that fit and `unfit` that don't, looking at no more than `most`."""
        seen: list[tuple[float, int, Place]] = []
        found: list[Place] = []
        fitting = 0
        while self._heap and len(seen) < most and fitting < enough:
            before, number, place = heapq.heappop(self._heap)
            after = self._of(place)
            if after > before + 1e-12 and self._heap and after > self._heap[0][0]:
                heapq.heappush(self._heap, (after, number, place))
                continue
            seen.append((after, number, place))
            if fits(place):
                fitting += 1
                found.append(place)
            elif len(found) - fitting < unfit:
                found.append(place)
        for entry in seen:
            heapq.heappush(self._heap, entry)
        return found
