"""Which models should be active and are not, most pressing first, and why others can't be."""

from collections.abc import Iterable, Set
from dataclasses import dataclass

from prism.common.messages.models import InitialPlacement, ModelState
from prism.scheduling.placement.actions import Note
from prism.scheduling.placement.snapshot import ClusterSnapshot, Demand, ModelView, WorkerView

AT_WORK = frozenset(
    {ModelState.ACTIVE, ModelState.STAGING, ModelState.STARTING, ModelState.WAKING, ModelState.DRAINING}
)
NO_DEMAND = Demand()


@dataclass(frozen=True)
class Wanted:
    """A model that should be active. `home` names the only workers that it may go to, None for any.
    Without `may_evict` it takes free memory only."""

    name: str
    view: ModelView
    reason: str
    demand: Demand = NO_DEMAND
    home: Set[str] | None = None
    may_evict: bool = True


def wanted_models(snapshot: ClusterSnapshot) -> tuple[list[Wanted], list[Note]]:
    """In order: pinned models; those that requests are parked for, the longest waiting first; those with an
    initial placement that is `on` and that were not started yet, in the order of registration.

    A model that is active or on its way between states on a worker that stays is not among them. Parked
    requests may take a model to any worker, the other two reasons only to the GPUs that they name.
    """
    workers = [worker for worker in snapshot.workers if not worker.draining]
    busy = {command.model for command in snapshot.in_flight}
    for worker in workers:
        busy.update(name for name, model in worker.models.items() if model.state in AT_WORK)
    notes: list[Note] = []
    pinned, parked, initial = [], [], []
    for name, view in snapshot.models.items():
        demand = snapshot.demand.get(name, NO_DEMAND)
        first = not view.started and _on_placement(view) is not None
        if name in busy or view.removed or not (demand.parked or view.spec.pin or first):
            continue
        if (obstacle := _obstacle(view)) is not None:
            notes.append(Note(name, obstacle))
        elif demand.parked:
            parked.append(Wanted(name, view, f"{demand.parked} requests parked", demand))
        elif view.spec.pin:
            pinned += _at_home(Wanted(name, view, "pinned"), workers, notes)
        else:
            wanted = Wanted(name, view, "initial placement", may_evict=False)
            initial += _at_home(wanted, workers, notes)
    parked.sort(key=lambda want: (-want.demand.oldest_parked_s, -want.view.spec.priority, want.name))
    return [*pinned, *parked, *initial], notes


def _obstacle(view: ModelView) -> str | None:
    if view.facts is None:
        return "waits for a model store to read its folder"
    if view.facts.error is not None:
        return f"can't be placed: {view.facts.error}"
    return None


def _at_home(wanted: Wanted, workers: Iterable[WorkerView], notes: list[Note]) -> list[Wanted]:
    """`wanted`, bound to the workers that have the GPUs of its initial placement; nothing if none has."""
    placement = _on_placement(wanted.view) or next(iter(wanted.view.spec.init_placements), None)
    if placement is None:
        return [wanted]
    home = frozenset(worker.id for worker in workers if set(placement.gpu_ids) <= set(worker.gpu_ids))
    if not home:
        notes.append(
            Note(wanted.name, f"waits for a worker with GPU ids {placement.gpu_ids}; none has them now")
        )
        return []
    return [Wanted(wanted.name, wanted.view, wanted.reason, home=home, may_evict=wanted.may_evict)]


def _on_placement(view: ModelView) -> InitialPlacement | None:
    return next((placement for placement in view.spec.init_placements if placement.on), None)
