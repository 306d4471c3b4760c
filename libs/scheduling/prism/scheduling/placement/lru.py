"""The simple policy: serve whoever is asked for; when memory is short, the least recently used sleeps."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from prism.common.messages.models import ModelState, Tier
from prism.scheduling.memory import footprint, kv_reservation
from prism.scheduling.placement.actions import Action, Activate, Doze, Note, Plan, Release
from prism.scheduling.placement.backoff import FIRST_S
from prism.scheduling.placement.room import WorkerRoom
from prism.scheduling.placement.snapshot import ClusterSnapshot, ResidentModel
from prism.scheduling.placement.wants import AT_WORK, NO_DEMAND, Wanted, wanted_models

_OFF_THE_DEVICE = frozenset({ModelState.COLD, ModelState.STAGED})
_HAS_ENGINE = frozenset({*AT_WORK, ModelState.DOZING, ModelState.STARTING, ModelState.WAKING})


@dataclass(frozen=True)
class LruPlacement:
    """An instance of each model that is in demand, on any worker that has room or can make it, and as many
    replicas as asked for where memory is free on others.

    Idle models sleep at once for others, least recently used first. Busy ones do only when a request has
    waited for `patience_s`, and after having been active for `min_active_s`: continuous traffic to some
    models can't starve another, nor can two models throw each other out all the time. They finish their
    requests first, within `drain_s`. A model that came up less than `settle_s` ago counts as busy: the
    requests that it was woken for are still on their way. A model bound to GPUs that have been gone for
    `home_patience_s` goes elsewhere. Seconds throughout.
    """

    patience_s: float = 2.0
    min_active_s: float = 5.0
    drain_s: float = 60.0
    settle_s: float = 0.5
    home_patience_s: float = 15.0

    def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
        """See PlacementPolicy."""
        return _Planning(self, snapshot, now).plan()


class _Planning:
    """One plan in the making."""

    def __init__(self, policy: LruPlacement, snapshot: ClusterSnapshot, now: float) -> None:
        self.policy = policy
        self.snapshot = snapshot
        self.actions: list[Action] = []
        self.notes: dict[Note, None] = {}
        commands = defaultdict(list)
        for command in snapshot.in_flight:
            commands[command.worker].append(command)
        self.rooms = {
            worker.id: WorkerRoom(worker, commands[worker.id])
            for worker in snapshot.workers
            if not worker.draining
        }
        self.backing_off = {
            (failure.worker, failure.model): failure
            for failure in snapshot.failures
            if failure.retry_at > now
        }

    def plan(self) -> Plan:
        """Serve the wanted models in their order, then put away what nobody needs."""
        wants, notes = wanted_models(self.snapshot, self.policy.home_patience_s)
        self.notes.update(dict.fromkeys(notes))
        for wanted in wants:
            self._place(wanted)
        self._doze_the_idle()
        self._release_the_removed()
        return Plan(tuple(self.actions), tuple(self.notes))

    def _place(self, wanted: Wanted) -> None:
        rooms = self._candidates(wanted)
        steps = [self._use_free_memory]
        if wanted.may_evict:
            steps += [
                self._await_idle,
                self._evict_idle,
                self._await_busy,
                self._evict_busy,
                self._await_ripe,
            ]
        if rooms and not any(step(wanted, rooms) for step in steps):
            evicts = "waits for memory that busy or pinned models hold"
            text = evicts if wanted.may_evict else f"waits for free memory ({wanted.reason})"
            self.notes[Note(wanted.name, text, passing=True)] = None

    def _use_free_memory(self, wanted: Wanted, rooms: list[WorkerRoom]) -> bool:
        room = self._best(wanted, rooms, lambda room: room.missing(self._need(wanted, room)))
        if room is None:
            return False
        spec, facts = wanted.view.spec, wanted.view.facts
        assert facts is not None
        room.activate(wanted.name, self._need(wanted, room))
        self.actions.append(
            Activate(
                model=wanted.name,
                worker=room.worker.id,
                kv_bytes=kv_reservation(spec, facts, room.worker.element_bytes),
                footprint_bytes=self._footprint(wanted, room),
                reason=wanted.reason,
            )
        )
        return True

    def _await_idle(self, wanted: Wanted, rooms: list[WorkerRoom]) -> bool:
        return self._claim(wanted, rooms, lambda room: room.missing(self._need(wanted, room), soon=True))

    def _evict_idle(self, wanted: Wanted, rooms: list[WorkerRoom]) -> bool:
        return self._evict(wanted, rooms, self._idle_victims, late=False)

    def _await_busy(self, wanted: Wanted, rooms: list[WorkerRoom]) -> bool:
        return self._claim(wanted, rooms, lambda room: room.missing(self._need(wanted, room), late=True))

    def _evict_busy(self, wanted: Wanted, rooms: list[WorkerRoom]) -> bool:
        def ripe(room: WorkerRoom, wanted: Wanted) -> list[str]:
            busy = self._busy_victims(room, wanted)
            enough = self.policy.min_active_s
            models = room.worker.models
            return self._idle_victims(room, wanted) + [n for n in busy if models[n].state_s >= enough]

        return self._out_of_patience(wanted) and self._evict(wanted, rooms, ripe, late=True)

    def _await_ripe(self, wanted: Wanted, rooms: list[WorkerRoom]) -> bool:
        """Keep what comes free meanwhile from going to someone who has waited less."""

        def missing(room: WorkerRoom) -> int:
            victims = self._idle_victims(room, wanted) + self._busy_victims(room, wanted)
            return room.missing(self._need(wanted, room), late=True) - _held(room, victims)

        return self._out_of_patience(wanted) and self._claim(wanted, rooms, missing)

    def _out_of_patience(self, wanted: Wanted) -> bool:
        return wanted.demand.waited_s > self.policy.patience_s

    def _claim(self, wanted: Wanted, rooms: list[WorkerRoom], missing: Callable[[WorkerRoom], int]) -> bool:
        room = self._best(wanted, rooms, missing)
        if room is None:
            return False
        room.claim(self._need(wanted, room))
        return True

    def _evict(
        self,
        wanted: Wanted,
        rooms: list[WorkerRoom],
        victims_of: Callable[[WorkerRoom, Wanted], list[str]],
        *,
        late: bool,
    ) -> bool:
        """Have as many victims doze, in their order, as it takes; nothing where all would not be enough."""
        victims = {room.worker.id: victims_of(room, wanted) for room in rooms}

        def missing(room: WorkerRoom) -> int:
            return room.missing(self._need(wanted, room), soon=True, late=late)

        room = self._best(wanted, rooms, lambda room: missing(room) - _held(room, victims[room.worker.id]))
        if room is None:
            return False
        for name in victims[room.worker.id]:
            if missing(room) <= 0:
                break
            self._doze(room, name, f"memory for {wanted.name}: {wanted.reason}", soon=not late)
        room.claim(self._need(wanted, room))
        return True

    def _best(
        self, wanted: Wanted, rooms: list[WorkerRoom], missing: Callable[[WorkerRoom], int]
    ) -> WorkerRoom | None:
        """Of those where nothing is missing: one where it dozes already, else one that is ready to start
        engines, with most free memory."""

        def rank(room: WorkerRoom) -> tuple[bool, bool, int, str]:
            here = room.worker.models.get(wanted.name)
            dozes = here is not None and here.state is ModelState.DOZING
            return not dozes, not room.worker.ready, room.missing(0), room.worker.id

        return min((room for room in rooms if missing(room) <= 0), key=rank, default=None)

    def _candidates(self, wanted: Wanted) -> list[WorkerRoom]:
        """The workers that could hold it and may be asked to; why there is none is noted."""
        name, tp_size = wanted.name, wanted.view.spec.tp_size
        rooms = [
            room
            for room in self.rooms.values()
            if len(room.worker.gpu_ids) >= tp_size
            and (wanted.home is None or room.worker.id in wanted.home)
            and room.worker.id not in wanted.beside
        ]
        if not rooms:
            which = f"a further worker ({wanted.reason})" if wanted.beside else "a worker"
            self._note(name, f"waits for {which}; none is there with {tp_size} GPU(s)")
            return []
        large = [room for room in rooms if self._footprint(wanted, room) <= room.worker.limit_bytes]
        if not large:
            largest = max(rooms, key=lambda room: room.worker.limit_bytes)
            takes, limit = self._footprint(wanted, largest), largest.worker.limit_bytes
            self._note(
                name,
                f"too large: it takes {_gb(takes)} (weights and KV cache), the largest worker "
                f"{largest.worker.id} has {_gb(limit)}; lower its max_memory_pool_size or raise the limit",
            )
        return [room for room in large if name not in room.commanded and not self._backs_off(room, name)]

    def _backs_off(self, room: WorkerRoom, name: str) -> bool:
        failure = self.backing_off.get((room.worker.id, name))
        if failure is not None:
            text = f"failed on {failure.worker}, {failure.count} in a row, will retry: {failure.reason}"
            # Its worker has told of the failure.
            self.notes[Note(name, text, passing=True)] = None
            return True
        here = room.worker.models.get(name)
        return here is not None and here.state is ModelState.FAILED and here.state_s < FIRST_S

    def _footprint(self, wanted: Wanted, room: WorkerRoom) -> int:
        assert wanted.view.facts is not None
        worker = room.worker
        here = worker.models.get(wanted.name)
        # Where quotas move, it wakes with no more than the command gives, however much it had.
        if here is not None and here.active_bytes and not worker.elastic:
            return here.active_bytes + worker.context_bytes
        return footprint(wanted.view.spec, wanted.view.facts, worker.element_bytes) + worker.context_bytes

    def _need(self, wanted: Wanted, room: WorkerRoom) -> int:
        """Bytes that activating it would take there, beyond what it holds there."""
        here = room.worker.models.get(wanted.name)
        held = here.held_bytes if here is not None else 0
        if here is not None and here.state in _HAS_ENGINE:
            held += room.worker.context_bytes
        return max(0, self._footprint(wanted, room) - held)

    def _idle_victims(self, room: WorkerRoom, wanted: Wanted) -> list[str]:
        idle = [item for item in self._sleepers(room, wanted) if self._is_idle(item[1])]
        idle.sort(key=lambda item: (self._priority(item[0]), -item[1].idle_s, item[0]))
        return [name for name, _ in idle]

    def _busy_victims(self, room: WorkerRoom, wanted: Wanted) -> list[str]:
        busy = [item for item in self._sleepers(room, wanted) if not self._is_idle(item[1])]
        busy.sort(key=lambda item: (self._priority(item[0]), -item[1].state_s, item[0]))
        return [name for name, _ in busy]

    def _sleepers(self, room: WorkerRoom, wanted: Wanted) -> list[tuple[str, ResidentModel]]:
        """Those that may be made to doze for `wanted`: none that requests have waited longer for."""
        return [
            (name, model)
            for name, model in room.worker.models.items()
            if self._may_doze(room, name, model) and self._longest_wait(name) <= wanted.demand.oldest_parked_s
        ]

    def _may_doze(self, room: WorkerRoom, name: str, model: ResidentModel) -> bool:
        view = self.snapshot.models.get(name)
        return (
            view is not None
            and view.facts is not None
            and model.state is ModelState.ACTIVE
            and name not in room.commanded
            and not view.spec.pin
            and view.spec.minimum_tier is not Tier.ACTIVE
            and (room.worker.id, name) not in self.backing_off
        )

    def _doze(self, room: WorkerRoom, name: str, reason: str, *, soon: bool) -> None:
        room.doze(name, soon=soon)
        self.actions.append(Doze(name, room.worker.id, self.policy.drain_s, reason))

    def _is_idle(self, model: ResidentModel) -> bool:
        return not model.busy and model.state_s >= self.policy.settle_s

    def _longest_wait(self, name: str) -> float:
        demand = self.snapshot.demand.get(name, NO_DEMAND)
        return demand.oldest_parked_s if demand.parked else 0.0

    def _priority(self, name: str) -> int:
        return self.snapshot.models[name].spec.priority

    def _doze_the_idle(self) -> None:
        # All replicas of a model or none: those that stay would call for the others again.
        idle_s: dict[str, float] = {}
        for room in self.rooms.values():
            for name, model in room.worker.models.items():
                if model.state in AT_WORK:
                    idle_s[name] = min(model.idle_s, idle_s.get(name, model.idle_s))
        for room in self.rooms.values():
            for name, model in room.worker.models.items():
                view = self.snapshot.models.get(name)
                timeout = view.spec.idle_timeout_s if view else None
                if timeout is None or idle_s.get(name, 0.0) <= timeout or not self._is_idle(model):
                    continue
                if self._may_doze(room, name, model) and not self.snapshot.demand.get(name, NO_DEMAND).parked:
                    self._doze(room, name, f"idle for more than {timeout:g} s", soon=True)

    def _release_the_removed(self) -> None:
        for room in self.rooms.values():
            for name, model in room.worker.models.items():
                view = self.snapshot.models.get(name)
                if view is None or not view.removed or view.facts is None or model.state in _OFF_THE_DEVICE:
                    continue
                if name not in room.commanded and (room.worker.id, name) not in self.backing_off:
                    room.commanded.add(name)
                    self.actions.append(Release(name, room.worker.id, "not registered any more"))

    def _note(self, name: str, text: str) -> None:
        self.notes[Note(name, text)] = None


def _held(room: WorkerRoom, names: list[str]) -> int:
    return sum(room.worker.models[name].held_bytes for name in names)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
