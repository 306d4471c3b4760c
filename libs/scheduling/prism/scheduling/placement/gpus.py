"""GPUs, places and instances while a plan is being made: memory and work, as the plan changes them."""

from typing import NamedTuple

from prism.common.messages.models import ModelState
from prism.scheduling.placement.pressure import NO_WORK, Company, Work, pressure_of
from prism.scheduling.placement.snapshot import ModelView, ResidentModel, WorkerView


class Gpu:
    """One GPU. Bytes: `free` now, less what activations under way will still take; `soon` and `late` come
    free when idle and busy models have left; `claimed` is kept for models that wait for it. `unreserved` is
    the part of `free` for which nobody must give up KV quota, `kv_space` what there is for KV cache beside
    weights and contexts. On workers of the same `kind` a model takes the same."""

    __slots__ = (
        "_pressure",
        "claimed",
        "company",
        "compute",
        "free",
        "id",
        "instances",
        "kind",
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

    def __init__(self, worker: WorkerView, gpu_id: int, kind: int) -> None:
        self.worker = worker
        self.id = gpu_id
        self.kind = kind
        self.limit = worker.limit_bytes
        reserved = worker.reserved_by_gpu.get(gpu_id, worker.reserved_bytes)
        self.free = self.unreserved = self.kv_space = self.limit - reserved
        self.soon = self.late = self.claimed = self.queued = 0
        self.kv_wanted = self.compute = self.requests_per_s = 0.0
        self.company = Company()
        self.instances: list[Instance] = []
        self._pressure: float | None = None

    @property
    def pressure(self) -> float:
        """The worse of its KV and its compute pressure."""
        known = self._pressure
        if known is None:
            known = pressure_of(self.kv_wanted, self.kv_space, self.compute, self.company.strain)
            self._pressure = known
        return known

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
        self._pressure = None
        self.kv_wanted += work.kv_bytes
        self.compute += work.compute
        self.requests_per_s += work.requests_per_s
        self.kv_space -= nbytes
        self.company.join(work)

    def lose(self, work: Work, nbytes: int) -> None:
        """The reverse of `take`."""
        self._pressure = None
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
    def room(self) -> int:
        """Bytes that are free and not spoken for, on the GPU that has least of them."""
        gpus = self.gpus
        if len(gpus) == 1:
            return gpus[0].free - gpus[0].claimed
        return min([gpu.free - gpu.claimed for gpu in gpus])

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
