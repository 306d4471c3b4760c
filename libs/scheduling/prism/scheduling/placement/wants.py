"""Which models should be active and are not, most pressing first, and why others can't be."""

from collections import defaultdict
from collections.abc import Iterable, Set

import msgspec

from prism.common.messages.models import InitialPlacement, ModelState
from prism.scheduling.placement.actions import Note
from prism.scheduling.placement.snapshot import ClusterSnapshot, Demand, ModelView, WorkerView

AT_WORK = frozenset(
    {ModelState.ACTIVE, ModelState.STAGING, ModelState.STARTING, ModelState.WAKING, ModelState.DRAINING}
)
NO_DEMAND = Demand()


class Wanted(msgspec.Struct, frozen=True):
    """A model that should be active. `home` names the only workers that it may go to, None for any; a replica
    goes to none of those `beside` which it is placed. Of a `home`, `gpu_ids` are the
    ones named. `moves_from` is the worker that it is to leave. Without
    `may_evict` it takes free memory only."""

    name: str
    view: ModelView
    reason: str
    demand: Demand = NO_DEMAND
    home: Set[str] | None = None
    may_evict: bool = True
    beside: Set[str] = frozenset()
    gpu_ids: tuple[int, ...] = ()
    moves_from: str = ""


def wanted_models(
    snapshot: ClusterSnapshot, home_patience_s: float = 15.0
) -> tuple[list[Wanted], list[Note]]:
    """In order: pinned models; those that requests are parked for, the longest waiting first; those with an
    initial placement that is `on` and that were not started yet, in the order of registration; what is
    missing of the replicas of models that are active.

    A model that is active or on its way between states on a worker that stays, and not outdated there, is not
    among the first three.
    Parked requests may take a model to any worker, as may the want of a replica; the other two reasons only
    to the GPUs that they name, unless those have been gone for `home_patience_s` seconds. A pinned model
    that requests are parked for waits for nobody: where no worker has its GPUs, or it failed on all that do,
    it may go to any.
    """
    workers = [worker for worker in snapshot.workers if not worker.draining]
    placed, active = defaultdict(set), set()
    outdated = {(worker.id, name) for worker in workers for name in worker.outdated}
    for command in snapshot.in_flight:
        if (command.worker, command.model) not in outdated:
            placed[command.model].add(command.worker)
    for worker in workers:
        for name, model in worker.models.items():
            if model.outdated:
                continue
            if model.state in AT_WORK:
                placed[name].add(worker.id)
            if model.state is ModelState.ACTIVE:
                active.add(name)
    gone = frozenset(gpu for gpu, seconds in snapshot.gone_gpus.items() if seconds > home_patience_s)
    failed = {(failure.worker, failure.model) for failure in snapshot.failures}
    notes: list[Note] = []
    pinned, parked, initial, further = [], [], [], []
    for name, view in snapshot.models.items():
        demand = snapshot.demand.get(name, NO_DEMAND)
        first = not view.started and _on_placement(view) is not None
        if name in active and not view.removed:
            further += _further(name, view, placed[name], len(workers))
        if name in placed or view.removed or not (demand.parked or view.spec.pin or first):
            continue
        if (obstacle := _obstacle(view)) is not None:
            notes.append(Note(name, obstacle))
        elif view.spec.pin and demand.parked:
            wanted = Wanted(name, view, f"pinned, {demand.parked} requests parked", demand)
            able = [worker for worker in workers if (worker.id, name) not in failed]
            pinned += _at_home(wanted, able, frozenset(), []) or [wanted]
        elif demand.parked:
            parked.append(Wanted(name, view, f"{demand.parked} requests parked", demand))
        elif view.spec.pin:
            pinned += _at_home(Wanted(name, view, "pinned"), workers, gone, notes)
        else:
            wanted = Wanted(name, view, "initial placement", may_evict=False)
            initial += _at_home(wanted, workers, gone, notes)
    parked.sort(key=lambda want: (-want.demand.oldest_parked_s, -want.view.spec.priority, want.name))
    return [*pinned, *parked, *initial, *further], notes


def _obstacle(view: ModelView) -> str | None:
    if view.facts is None:
        return "waits for a model store to read its folder"
    if view.facts.error is not None:
        return f"can't be placed: {view.facts.error}"
    return None


def _at_home(
    wanted: Wanted, workers: Iterable[WorkerView], gone: Set[int], notes: list[Note]
) -> list[Wanted]:
    """`wanted`, bound to the workers that have the GPUs of its initial placement; to none, and to free
    memory, when they are `gone`; nothing while they are waited for."""
    placement = _on_placement(wanted.view) or next(iter(wanted.view.spec.init_placements), None)
    if placement is None:
        return [wanted]
    named = set(placement.gpu_ids)
    home = frozenset(worker.id for worker in workers if named <= set(worker.gpu_ids))
    if home:
        return [msgspec.structs.replace(wanted, home=home, gpu_ids=tuple(placement.gpu_ids))]
    if named & gone and named - gone <= {gpu for worker in workers for gpu in worker.gpu_ids}:
        reason = f"{wanted.reason}, its GPU ids {placement.gpu_ids} are gone"
        return [msgspec.structs.replace(wanted, reason=reason, may_evict=False)]
    notes.append(Note(wanted.name, f"waits for a worker with GPU ids {placement.gpu_ids}; none has them now"))
    return []


def _further(name: str, view: ModelView, placed: Set[str], workers: int) -> list[Wanted]:
    """The replicas of an active model that are missing, no more than there are workers."""
    if _obstacle(view) is not None:
        return []
    reason = f"{view.spec.replicas} replicas asked for"
    missing = min(view.spec.replicas, workers + 1) - len(placed)
    return [Wanted(name, view, reason, may_evict=False, beside=placed)] * max(0, missing)


def _on_placement(view: ModelView) -> InitialPlacement | None:
    return next((placement for placement in view.spec.init_placements if placement.on), None)
