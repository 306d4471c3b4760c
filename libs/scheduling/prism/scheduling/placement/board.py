"""The cluster while a plan is being made: who is where, what is free, and what comes free."""

from collections import defaultdict
from collections.abc import Callable, Iterator

from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement.gpus import Gpu, Instance, Place
from prism.scheduling.placement.nearest import ALL_PLACES, Front, places_within
from prism.scheduling.placement.pressure import Work, work_of
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
        self._fronts: dict[object, Front] = {}
        self._measured = False
        self._kinds: dict[tuple[int | None, bool], WorkerView] = {}
        self._taken: dict[int, tuple[int, int]] = {}
        self._sized: ModelView | None = None
        numbers: dict[tuple[int | None, bool, int], int] = {}
        for worker in snapshot.workers:
            if not worker.draining:
                alike = (worker.element_bytes, worker.elastic, worker.context_bytes)
                kind = numbers.setdefault(alike, len(numbers))
                gpus = tuple([Gpu(worker, gpu_id, kind) for gpu_id in worker.gpu_ids])
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
            instance.leaving |= resident.outdated or (worker.id, name) in leaving
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

    def need_at(self, view: ModelView, place: Place) -> int:
        """`need` for one of many places of a model."""
        return self._taken_at(view, place)[0]

    def fixed_at(self, view: ModelView, place: Place) -> int:
        """`fixed_bytes` for one of many places of a model."""
        return self._taken_at(view, place)[1]

    def _taken_at(self, view: ModelView, place: Place) -> tuple[int, int]:
        """Both: of workers of a kind that hold nothing of the model only the first is asked."""
        worker = place.worker
        if view.spec.model_name in worker.models:
            return self.need(view, worker), self.fixed_bytes(view, worker)
        if view is not self._sized:
            self._sized, self._taken = view, {}
        kind = place.gpus[0].kind
        taken = self._taken.get(kind)
        if taken is None:
            taken = self._taken[kind] = self.need(view, worker), self.fixed_bytes(view, worker)
        return taken

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

    def could_ever_fit(self, view: ModelView, place: Place) -> bool:
        """Whether it fits into GPUs of that worker that hold nothing else."""
        worker = place.worker
        here = worker.models.get(view.spec.model_name)
        if here is None:
            return self.need_at(view, place) <= worker.limit_bytes
        takes = sizes_on(view, worker).weights + self.kv_at_least(view, worker)
        if not worker.elastic:
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
                yield from places_within(whole, tp_size, rank)
            return
        front = self._fronts.get((rank, tp_size))
        if front is None:
            wholes = (whole for whole in self.places.values() if len(whole.gpus) >= tp_size)
            places = [place for whole in wholes for place in places_within(whole, tp_size, rank)]
            front = self._fronts[rank, tp_size] = Front(places, rank)
        near = front.nearest(fits)
        yield from near
        if asleep := self.asleep.get(view.spec.model_name):
            seen = {place.gpus for place in near}
            yield from (one.place for one in asleep if one.place.gpus not in seen)

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
