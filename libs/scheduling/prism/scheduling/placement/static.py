"""No sharing: every model has its home and its memory for good. The baseline that sharing is measured by."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prism.common.messages.models import InitialPlacement
from prism.scheduling.placement.actions import Activate, Plan
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Gpu, Place
from prism.scheduling.placement.pressure import NO_WORK
from prism.scheduling.placement.pricing import sizes_on
from prism.scheduling.placement.prospects import Manners
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import ClusterSnapshot, ModelView, WorkerView
from prism.scheduling.placement.wants import AT_WORK

_NEVER = float("inf")


@dataclass(frozen=True)
class StaticPlacement:
    """An instance of each model at each of its initial placements that are `on`, with its whole KV
    reservation; models without any go, in the order of registration, to the GPU with most memory left. None
    ever sleeps or moves; what doesn't fit stays out, with a note.

    What a cluster without Prism does, and the first of the three modes of the paper's prototype. With
    `shares_kv` it is the second: on workers that move KV quotas an instance gets the least that it can have,
    and more when it needs it.
    """

    shares_kv: bool = False

    def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
        """See PlacementPolicy."""
        board = Board(snapshot, now)
        reconciler = Reconciler(snapshot, board, Manners(_NEVER, _NEVER, 60.0, 0.0))
        at: dict[str, set[str]] = defaultdict(set)
        for worker, model in board.commanded:
            at[model].add(worker)
        for place in board.places.values():
            for name, resident in place.worker.models.items():
                if resident.outdated:
                    at[name].discard(place.worker.id)
                elif resident.state in AT_WORK:
                    at[name].add(place.worker.id)
        with_gpu: dict[int, list[Place]] = defaultdict(list)
        for place in board.places.values():
            for gpu_id in place.worker.gpu_ids:
                with_gpu[gpu_id].append(place)
        for name, view in snapshot.models.items():
            homes = [placement for placement in view.spec.init_placements if placement.on]
            if view.removed:
                continue
            if view.spec.init_placements and not homes:
                reconciler.note(name, "stays off: no initial placement of it is `on`, and nothing wakes here")
            elif view.facts is None:
                reconciler.note(name, "waits for a model store to read its folder")
            elif view.facts.error is not None:
                reconciler.note(name, f"can't be placed: {view.facts.error}")
            elif homes:
                for home in homes:
                    self._settle(reconciler, view, _named(with_gpu, home), at[name], home)
            elif not at[name]:
                fullness = _fullness_shared if self.shares_kv else _fullness
                self._settle(reconciler, view, list(board.places_for(view, fullness, _any)), at[name])
        reconciler.release_the_removed()
        return reconciler.plan()

    def _settle(
        self,
        reconciler: Reconciler,
        view: ModelView,
        places: list[Place],
        at: set[str],
        home: InitialPlacement | None = None,
    ) -> None:
        """One instance at one of `places`, unless it is there already."""
        board, name = reconciler.board, view.spec.model_name
        if any(place.worker.id in at for place in places):
            return
        tp_size = view.spec.tp_size
        places = [p for p in places if not p.worker.tp_sizes or tp_size in p.worker.tp_sizes]
        # Where one of another version leaves there is room for it, but not now.
        places = [p for p in places if not _leaves(p.worker, name)] or places
        if places and _leaves(places[0].worker, name):
            reconciler.note(name, "waits until the engine of its old version has left", passing=True)
            return
        if not places:
            gpus = f"GPU ids {home.gpu_ids}" if home is not None else f"{tp_size} GPU(s)"
            reconciler.note(name, f"waits for a worker with {gpus}; none has them now")
            return

        def left(place: Place) -> int:
            has = min(gpu.free if self.shares_kv else gpu.unreserved for gpu in place.gpus)
            return has - self._missing(board, view, place)

        def fails(place: Place) -> bool:
            return (place.worker.id, name) in board.backing_off

        best = max(
            places, key=lambda place: (left(place) >= 0, not fails(place), left(place), place.worker.id)
        )
        if left(best) < 0:
            short = -left(best) / 1e9
            reconciler.note(name, f"stays out: its home lacks {short:.3f} GB for its weights and KV cache")
        elif (failure := board.backing_off.get((best.worker.id, name))) is not None:
            text = f"failed on {failure.worker}, {failure.count} in a row, will retry: {failure.reason}"
            reconciler.note(name, text, passing=True)
        else:
            kv = self._kv_bytes(board, view, best.worker)
            takes = board.fixed_bytes(view, best.worker) + kv
            board.activate(view, best, self._missing(board, view, best), NO_WORK)
            at.add(best.worker.id)
            reason = "its home" if home is not None else "its home: most memory was free there"
            reconciler.actions.append(Activate(name, best.worker.id, kv, takes, reason, best.gpu_ids))

    def _kv_bytes(self, board: Board, view: ModelView, worker: WorkerView) -> int:
        return board.kv_at_least(view, worker) if self.shares_kv else sizes_on(view, worker).kv_reservation

    def _missing(self, board: Board, view: ModelView, place: Place) -> int:
        """Bytes of each GPU that it takes there beyond what it holds."""
        here = place.worker.models.get(view.spec.model_name)
        takes = board.fixed_bytes(view, place.worker) + self._kv_bytes(board, view, place.worker)
        return max(0, takes - (here.held_bytes if here else 0))


def _leaves(worker: WorkerView, name: str) -> bool:
    here = worker.models.get(name)
    return here is not None and here.outdated


def _named(with_gpu: Mapping[int, list[Place]], home: InitialPlacement) -> list[Place]:
    """The GPUs that a placement names, where one worker has them all."""
    named = set(home.gpu_ids)
    return [
        Place(whole.worker, tuple(gpu for gpu in whole.gpus if gpu.id in named))
        for whole in with_gpu.get(home.gpu_ids[0], ())
        if named <= set(whole.worker.gpu_ids)
    ]


def _fullness(gpu: Gpu) -> float:
    return -float(gpu.unreserved)


def _fullness_shared(gpu: Gpu) -> float:
    return -float(gpu.free)


def _any(place: Place) -> bool:
    return True
