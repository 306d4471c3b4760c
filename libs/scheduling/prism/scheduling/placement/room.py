"""A worker's memory while a plan is being made: what is free, on its way to be, and spoken for."""

from collections.abc import Iterable

from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement.snapshot import InFlight, WorkerView

_LEAVING = frozenset({CommandKind.DOZE, CommandKind.FREEZE, CommandKind.RELEASE})


class WorkerRoom:
    """Bytes of one worker, changed by the plan's own actions.

    `free` is free now, less what activations under way will still take. Models that are being put to sleep
    give back `freeing_soon` (idle ones) and `freeing_late` (those that requests must leave first). Memory is
    `claimed` for a model that waits for it, so that nobody else takes what is freed for that one.
    `commanded` are the models that a command is in flight for or planned.
    """

    def __init__(self, worker: WorkerView, in_flight: Iterable[InFlight]) -> None:
        self.worker = worker
        self.free = worker.limit_bytes - worker.reserved_bytes
        self.freeing_soon = 0
        self.freeing_late = 0
        self.claimed = 0
        self.commanded: set[str] = set()
        leaving = {
            name
            for name, model in worker.models.items()
            if model.outdated or model.state is ModelState.DRAINING
        }
        for command in in_flight:
            self.commanded.add(command.model)
            if command.kind in _LEAVING:
                leaving.add(command.model)
            elif command.kind is CommandKind.ACTIVATE:
                here = worker.models.get(command.model)
                self.free -= max(0, command.footprint_bytes - (here.held_bytes if here else 0))
        for name in leaving & worker.models.keys():
            self._leaves(name, soon=not worker.models[name].busy)

    def missing(self, need: int, *, soon: bool = False, late: bool = False) -> int:
        """How many of `need` bytes are not free; with `soon` also counting as free what idle models will have
        given back, with `late` that and what busy ones will have. Negative: that much is left over."""
        coming = self.freeing_soon + self.freeing_late if late else self.freeing_soon if soon else 0
        return need - (self.free - self.claimed + coming)

    def activate(self, name: str, need: int) -> None:
        """A model takes `need` bytes that are free."""
        self.commanded.add(name)
        self.free -= need

    def claim(self, need: int) -> None:
        """Keep `need` bytes, free or not, for a model that waits for them."""
        self.claimed += need

    def doze(self, name: str, *, soon: bool) -> None:
        """A resident model starts to leave."""
        self.commanded.add(name)
        self._leaves(name, soon=soon)

    def _leaves(self, name: str, *, soon: bool) -> None:
        held = self.worker.models[name].held_bytes
        if soon:
            self.freeing_soon += held
        else:
            self.freeing_late += held
