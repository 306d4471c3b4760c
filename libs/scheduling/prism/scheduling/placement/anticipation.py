"""Having models ready before they are asked for, where that costs nobody anything: they wake ahead, or are
started once, so that they doze."""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from prism.common.messages.models import ModelState
from prism.scheduling.placement.gpus import Instance, Place
from prism.scheduling.placement.judging import Judge, Option
from prism.scheduling.placement.pricing import chance_to_return
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import ModelView
from prism.scheduling.placement.wants import NO_DEMAND, Wanted

if TYPE_CHECKING:
    from prism.scheduling.placement.balanced import BalancedPlacement

_SLEEPING = frozenset({ModelState.DOZING, ModelState.FROZEN, ModelState.STAGED})

ENOUGH_MISSES = 16
"""After so many models in a row that could not be woken ahead, or prepared, no further ones are looked at."""


class Anticipation:
    """Looks at models that nobody waits for, once all that are asked for have been placed."""

    def __init__(self, reconciler: Reconciler, judge: Judge, policy: "BalancedPlacement") -> None:
        self._reconciler = reconciler
        self._board = reconciler.board
        self._judge = judge
        self._policy = policy

    def wake_ahead(self) -> None:
        """Bring up models that will probably be asked for soon where that costs nobody anything."""
        board, reconciler = self._board, self._reconciler
        snapshot = reconciler.snapshot
        likely = self._likely()
        under_way = {model for _, model in board.commanded}
        left, misses = reconciler.most_unasked, 0
        room = max((gpu.free - gpu.claimed for gpu in board.gpus), default=0) if likely else 0
        for _, name, view in likely:
            if view.facts is None or view.facts.error is not None or view.spec.idle_timeout_s is not None:
                continue
            parked = snapshot.demand.get(name, NO_DEMAND).parked
            if name in under_way or parked or room < board.least_need(view):
                continue
            wanted = Wanted(name, view, "probably asked for soon, and memory is free", may_evict=False)
            if reconciler.bring_up(wanted, self._judge, partial(self._bearable, view)):
                room = max(gpu.free - gpu.claimed for gpu in board.gpus)
                left, misses = left - 1, 0
            else:
                misses += 1
            if left <= 0 or misses >= ENOUGH_MISSES:
                return

    def _likely(self) -> list[tuple[float, str, ModelView]]:
        """Models that sleep or are staged, failed nowhere, and will likely be asked for, likeliest first."""
        policy, board = self._policy, self._board
        states: dict[str, set[ModelState]] = {}
        for place in board.places.values():
            for name, resident in place.worker.models.items():
                if resident.state in _SLEEPING or resident.state is ModelState.FAILED:
                    states.setdefault(name, set()).add(resident.state)
        found = []
        for name, seen in states.items():
            view = self._reconciler.snapshot.models.get(name)
            if view is None or view.removed or ModelState.FAILED in seen:
                continue
            chance = chance_to_return(view, view.traffic.last_arrival_s, policy.horizon_s)
            if chance >= policy.likely and not board.serving.get(name) and not board.rising.get(name):
                found.append((-chance, name, view))
        return sorted(found, key=lambda entry: entry[:2])

    def prepare(self) -> None:
        """Have models that were never up start once, so that they doze instead of being staged when they are
        asked for: starting an engine takes many times as long as waking one. Those that nobody has asked for
        yet make room for each other; contexts take `context_share` of a GPU at most, and only where it is
        known what they take."""
        board, reconciler = self._board, self._reconciler
        prepared = misses = 0
        under_way = {model for _, model in board.commanded}
        unasked: dict[int, list[Instance]] = defaultdict(list)
        for instance in board.instances.values():
            if self._is_unasked(instance) and reconciler.may_doze(instance):
                for gpu in instance.place.gpus:
                    unasked[id(gpu)].append(instance)
        largest = max((gpu.limit for gpu in board.gpus), default=0)
        for name, view in reconciler.snapshot.models.items():
            if name in under_way or not self._could_be_prepared(name, view):
                continue
            if board.least_need(view) > largest:
                continue
            wanted = Wanted(name, view, "started once, so that it can wake fast", may_evict=False)
            if reconciler.bring_up(wanted, self._judge, partial(self._may_be_prepared, prepared)):
                prepared, misses = prepared + 1, 0
            elif self._make_way(wanted, unasked, prepared):
                misses = 0
            else:
                misses += 1
                if misses >= ENOUGH_MISSES:
                    return

    def _make_way(self, wanted: Wanted, unasked: Mapping[int, list[Instance]], prepared: int) -> bool:
        """Have one of the `unasked`, by their GPUs, doze where `wanted` fits once enough of them have."""
        board, reconciler = self._board, self._reconciler
        for place in reconciler.candidates(wanted, self._judge, tell=False):
            there = [unasked.get(id(gpu), ()) for gpu in place.gpus]
            need = board.need_at(wanted.view, place)
            room = min(
                gpu.free - gpu.claimed + sum(map(board.freed_bytes, instances))
                for gpu, instances in zip(place.gpus, there, strict=True)
            )
            instance = next((instances[0] for instances in there if instances), None)
            if instance is None or room < need or not self._has_context_room(place, prepared):
                continue
            reconciler.doze(instance, f"nobody asked for it yet; {wanted.name} starts")
            for gpu in instance.place.gpus:
                unasked[id(gpu)].remove(instance)
            for gpu in place.gpus:
                gpu.claimed += need
            return True
        return False

    def _could_be_prepared(self, name: str, view: ModelView) -> bool:
        board = self._board
        placed = board.serving.get(name) or board.rising.get(name) or board.asleep.get(name)
        return (
            not view.started
            and not view.removed
            and view.facts is not None
            and view.facts.error is None
            and not placed
            and not self._reconciler.snapshot.demand.get(name, NO_DEMAND).parked
        )

    def _is_unasked(self, instance: Instance) -> bool:
        view = instance.view
        return (
            view is not None
            and instance.serves
            and view.traffic.last_arrival_s == math.inf
            and not any(placement.on for placement in view.spec.init_placements)
            and self._reconciler.is_idle(instance)
        )

    def _may_be_prepared(self, prepared: int, option: Option) -> bool:
        return self._has_context_room(option.place, prepared)

    def _has_context_room(self, place: Place, prepared: int) -> bool:
        """Whether one more engine may come there, beside as many as are on their way already."""
        profile = place.worker.profile
        if profile is None or not profile.context_bytes:
            return False
        most = self._policy.context_share * place.worker.limit_bytes / profile.context_bytes
        return all(len(gpu.instances) + prepared + 1 <= most for gpu in place.gpus)

    def _bearable(self, view: ModelView, option: Option) -> bool:
        work = self._reconciler.expected_work(view, option.place)
        fixed = self._board.fixed_bytes(view, option.place.worker)
        return all(gpu.with_work(work, fixed) <= self._policy.kv_short for gpu in option.place.gpus)
