"""From where models should be to what can safely be done now: shared by all policies that place and move.

What a plan can't do yet it claims memory for, and a later plan, which sees the memory free, goes on: nothing
is remembered between plans.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeGuard

from prism.common.messages.models import ModelState, Tier
from prism.scheduling.placement.actions import Action, Activate, Doze, Freeze, Note, Plan, Release
from prism.scheduling.placement.backoff import FIRST_S
from prism.scheduling.placement.board import Board, Gpu, Instance, Place
from prism.scheduling.placement.pressure import Work, work_of
from prism.scheduling.placement.pricing import cost_on, sizes_on
from prism.scheduling.placement.snapshot import ClusterSnapshot, ModelView
from prism.scheduling.placement.wants import NO_DEMAND, Wanted

_OFF_THE_DEVICE = frozenset({ModelState.COLD, ModelState.STAGED})

MOVED_S = 15.0
"""By then a model that has come up as the target of a move is alone."""


class Manners(NamedTuple):
    """How gently models are put to sleep. Requests in flight may finish within `drain_s`. A busy model must
    leave only when a request for another has waited for `patience_s`, and after `min_active_s` of being
    active. One that came up less than `settle_s` ago counts as busy: the requests that it was woken for are
    still on their way. Seconds."""

    patience_s: float
    min_active_s: float
    drain_s: float
    settle_s: float


class Step(enum.IntEnum):
    """How a model can come to a place, gentlest first."""

    FREE = 0
    AWAIT_IDLE = 1
    EVICT_IDLE = 2
    AWAIT_BUSY = 3
    EVICT_BUSY = 4
    AWAIT_RIPE = 5


class Option(NamedTuple):
    """One place for a model, what it takes to have it there, and what each of its GPUs must give."""

    place: Place
    step: Step
    need: int
    victims: tuple[Instance, ...] = ()

    def pressure_with(self, work: Work, nbytes: int) -> float:
        """The highest pressure among its GPUs with one more instance, whose weights and context take
        `nbytes`, and without the victims."""
        highest = 0.0
        for gpu in self.place.gpus:
            gone = [victim for victim in self.victims if gpu in victim.place.gpus]
            for victim in gone:
                gpu.lose(victim.work, victim.resident.weights_bytes)
            highest = max(highest, gpu.with_work(work, nbytes))
            for victim in gone:
                gpu.take(victim.work, victim.resident.weights_bytes)
        return highest


class Judge(Protocol):
    """What policies differ in."""

    def gpu_rank(self, gpu: Gpu) -> float:
        """Which GPUs to look at first, least first."""
        ...

    def option_rank(self, wanted: Wanted, option: Option) -> tuple[float, ...]:
        """Which of the options to take, least first."""
        ...

    def victim_rank(self, instance: Instance) -> tuple[float, ...]:
        """Who of the idle sleeps first, least first."""
        ...

    def refuses(self, wanted: Wanted, option: Option) -> str | None:
        """Why even the best option is not taken now, None if it is."""
        ...

    def spares(self, instance: Instance) -> bool:
        """Whether an idle one is left alone as long as a busy one is."""
        ...


class Judging(Protocol):
    """A policy that weighs places: what explains it."""

    def judge(self, reconciler: "Reconciler") -> Judge:
        """Its judge, for one plan."""
        ...


def has_judge(policy: object) -> TypeGuard[Judging]:
    """Whether a policy weighs places."""
    return hasattr(policy, "judge")


class Reconciler:
    """One plan in the making."""

    def __init__(self, snapshot: ClusterSnapshot, board: Board, manners: Manners) -> None:
        self.snapshot = snapshot
        self.board = board
        self.manners = manners
        self.actions: list[Action] = []
        self.notes: dict[Note, None] = {}

    def plan(self) -> Plan:
        """What has come together."""
        return Plan(tuple(self.actions), tuple(self.notes))

    def note(self, model: str, text: str, *, passing: bool = False) -> None:
        """Say why a model is not where it should be."""
        self.notes[Note(model, text, passing)] = None

    def place(self, wanted: Wanted, judge: Judge) -> Option | None:
        """Have `wanted` come up at the best place, or come nearer to it; returns what was chosen."""
        places = self.candidates(wanted, judge)
        options = [option for place in places if (option := self.option(wanted, place, judge)) is not None]
        if min((option.step for option in options), default=Step.AWAIT_RIPE) > Step.EVICT_IDLE:
            self._unbind(wanted, judge)
        if options:
            refusals = [judge.refuses(wanted, option) for option in options]
            willing = [option for option, no in zip(options, refusals, strict=True) if no is None]
            if not willing:
                self.note(wanted.name, refusals[0] or "", passing=True)
                return None
            best = min(willing, key=lambda option: judge.option_rank(wanted, option))
            self.take(wanted, best)
            return best
        if places:
            evicts = "waits for memory that busy or pinned models hold"
            text = evicts if wanted.may_evict else f"waits for free memory ({wanted.reason})"
            self.note(wanted.name, text, passing=True)
        return None

    def candidates(self, wanted: Wanted, judge: Judge, *, tell: bool = True) -> list[Place]:
        """Places that could hold it and whose worker may be asked to; with `tell`, why there is none is
        noted."""
        name, tp_size, board = wanted.name, wanted.view.spec.tp_size, self.board

        def fits(place: Place) -> bool:
            need = board.need(wanted.view, place.worker)
            return all(need <= gpu.free - gpu.claimed for gpu in place.gpus)

        if wanted.home is not None:
            places = [self._at_home(board.places[worker], wanted) for worker in sorted(wanted.home)]
            places = [place for place in places if len(place.gpus) >= tp_size]
        else:
            places = list(board.places_for(wanted.view, judge.gpu_rank, fits))
        places = [
            place
            for place in places
            if place.worker.id not in wanted.beside
            and (not place.worker.tp_sizes or tp_size in place.worker.tp_sizes)
        ]
        if not places and not tell:
            return []
        if not places:
            which = f"a further worker ({wanted.reason})" if wanted.beside else "a worker"
            self.note(name, f"waits for {which}; none is there with {tp_size} GPU(s)")
            return []
        large = [place for place in places if board.could_ever_fit(wanted.view, place.worker)]
        if not large and tell:
            largest = max((place.worker for place in places), key=lambda worker: worker.limit_bytes)
            takes = board.fixed_bytes(wanted.view, largest) + board.kv_at_least(wanted.view, largest)
            self.note(
                name,
                f"too large: it takes {_gb(takes)} (weights and KV cache), the largest worker "
                f"{largest.id} has {_gb(largest.limit_bytes)}; lower its max_memory_pool_size or raise the "
                "limit",
            )
        return [
            place
            for place in large
            if (place.worker.id, name) not in board.commanded
            and not self.is_bound_elsewhere(place, name)
            and not self._backs_off(place, name, tell=tell)
        ]

    def _unbind(self, wanted: Wanted, judge: Judge) -> None:
        """Let go of an engine that sleeps on a GPU without room while another of its worker has some."""
        for instance in self.board.asleep.get(wanted.name, ()):
            whole = self.board.places[instance.place.worker.id]
            if len(whole.gpus) <= wanted.view.spec.tp_size:
                continue
            if not self.may_shed(instance):
                continue
            for place in self.board.places_within(whole, wanted.view.spec.tp_size, judge.gpu_rank):
                option = self.option(wanted, place, judge) if place.gpus != instance.place.gpus else None
                if option is not None and option.step <= Step.EVICT_IDLE:
                    self.board.shed(instance, self.gives(instance))
                    reason = f"comes up on another GPU: {wanted.reason}"
                    self.actions.append(Release(wanted.name, whole.worker.id, reason))
                    return

    def is_bound_elsewhere(self, place: Place, name: str) -> bool:
        """Whether its worker has an engine for the model that is bound to other GPUs."""
        if len(place.gpus) == len(place.worker.gpu_ids):
            return False
        bound = self.board.bound(name, place.worker)
        return bound is not None and bound != {gpu.id for gpu in place.gpus}

    @staticmethod
    def _at_home(whole: Place, wanted: Wanted) -> Place:
        named = tuple(gpu for gpu in whole.gpus if gpu.id in wanted.gpu_ids)
        return Place(whole.worker, named) if len(named) == wanted.view.spec.tp_size else whole

    def _backs_off(self, place: Place, name: str, *, tell: bool) -> bool:
        failure = self.board.backing_off.get((place.worker.id, name))
        if failure is not None:
            if tell:
                text = f"failed on {failure.worker}, {failure.count} in a row, will retry: {failure.reason}"
                self.note(name, text, passing=True)
            return True
        here = place.worker.models.get(name)
        return here is not None and here.state is ModelState.FAILED and here.state_s < FIRST_S

    def option(self, wanted: Wanted, place: Place, judge: Judge) -> Option | None:
        """The gentlest way to have it there now, None if there is none yet."""
        need = self.board.need(wanted.view, place.worker)
        short = [need - gpu.free + gpu.claimed for gpu in place.gpus]
        if max(short) <= 0:
            return Option(place, Step.FREE, need)
        if not wanted.may_evict:
            return None
        short = [missing - gpu.soon for missing, gpu in zip(short, place.gpus, strict=True)]
        if max(short) <= 0:
            return Option(place, Step.AWAIT_IDLE, need)
        idle = [
            instance
            for instance in self._sleepers(wanted, place)
            if (self.is_idle(instance) and not judge.spares(instance)) or self._is_extra(instance)
        ]
        idle.sort(key=judge.victim_rank)
        chosen = self._enough(idle, place, short)
        if chosen is not None:
            return Option(place, Step.EVICT_IDLE, need, chosen)
        short = [missing - gpu.late for missing, gpu in zip(short, place.gpus, strict=True)]
        if max(short) <= 0:
            return Option(place, Step.AWAIT_BUSY, need)
        if wanted.demand.oldest_parked_s <= self.manners.patience_s:
            return None
        busy = [
            instance for instance in self._sleepers(wanted, place) if instance.serves and instance not in idle
        ]
        busy.sort(key=_longest_active_first)
        ripe = [instance for instance in busy if instance.resident.state_s >= self.manners.min_active_s]
        chosen = self._enough(idle + ripe, place, short)
        if chosen is not None:
            return Option(place, Step.EVICT_BUSY, need, chosen)
        # Keeps what comes free meanwhile from going to someone who has waited less.
        if self._enough(idle + busy, place, short) is not None:
            return Option(place, Step.AWAIT_RIPE, need)
        return None

    def _sleepers(self, wanted: Wanted, place: Place) -> list[Instance]:
        """Those there that may give memory back for `wanted`: none that requests have waited longer for."""
        found: dict[str, Instance] = {}
        for gpu in place.gpus:
            for instance in gpu.instances:
                if instance.model == wanted.name or instance.model in found:
                    continue
                if self.may_doze(instance) or (self.may_shed(instance) and self.gives(instance) > 0):
                    demand = self.snapshot.demand.get(instance.model, NO_DEMAND)
                    waits = demand.oldest_parked_s if demand.parked else 0.0
                    if waits <= wanted.demand.oldest_parked_s:
                        found[instance.model] = instance
        return list(found.values())

    def gives(self, instance: Instance) -> int:
        """Bytes that putting it one tier lower frees on each of its GPUs."""
        if instance.resident.state is ModelState.ACTIVE:
            return self.board.freed_bytes(instance)
        return instance.place.worker.context_bytes

    def _enough(self, victims: list[Instance], place: Place, short: list[int]) -> tuple[Instance, ...] | None:
        """As many victims, in their order, as it takes, without those that turn out not to be needed."""
        missing = dict(zip((gpu.id for gpu in place.gpus), short, strict=True))
        chosen: list[Instance] = []
        for victim in victims:
            if max(missing.values()) <= 0:
                break
            helps = [gpu.id for gpu in victim.place.gpus if missing.get(gpu.id, 0) > 0]
            if helps:
                chosen.append(victim)
                for gpu in victim.place.gpus:
                    if gpu.id in missing:
                        missing[gpu.id] -= self.gives(victim)
        if max(missing.values()) > 0:
            return None
        for victim in reversed(chosen[:-1]):
            nbytes = self.gives(victim)
            on = [gpu.id for gpu in victim.place.gpus if gpu.id in missing]
            if all(missing[gpu_id] + nbytes <= 0 for gpu_id in on):
                chosen.remove(victim)
                for gpu_id in on:
                    missing[gpu_id] += nbytes
        return tuple(chosen)

    def take(self, wanted: Wanted, option: Option) -> None:
        """Do what an option says."""
        if option.step is Step.FREE:
            self.activate(wanted, option.place)
            return
        for victim in option.victims:
            self.sink(victim, f"memory for {wanted.name}: {wanted.reason}")
        for gpu in option.place.gpus:
            gpu.claimed += option.need

    def activate(self, wanted: Wanted, place: Place) -> None:
        """Bring a model up where memory is free."""
        board, view, worker = self.board, wanted.view, place.worker
        need = board.need(view, worker)
        kv = board.kv_at_least(view, worker)
        if worker.elastic:
            spare = min(gpu.free - gpu.claimed for gpu in place.gpus) - need
            wish = sizes_on(view, worker).kv_reservation - kv
            more = max(0, min(spare, wish, min(gpu.unreserved for gpu in place.gpus) - need))
            kv, need = kv + more, need + more
        here = worker.models.get(view.spec.model_name)
        held = here.held_bytes if here is not None else 0
        footprint = max(need + held, board.fixed_bytes(view, worker) + kv)
        board.activate(view, place, need, self.expected_work(view, place))
        name = view.spec.model_name
        self.actions.append(
            Activate(name, worker.id, kv, footprint, wanted.reason, place.gpu_ids, wanted.moves_from)
        )

    def expected_work(self, view: ModelView, place: Place, *, replaces: bool = False) -> Work:
        """The work of one more instance at `place`, or of the only one if it `replaces` another."""
        name, board = view.spec.model_name, self.board
        others = 0 if replaces else len(board.serving.get(name, ())) + len(board.rising.get(name, ()))
        return work_of(view, cost_on(view, place.worker), None, 1.0 / (1 + others))

    def sink(self, instance: Instance, reason: str) -> None:
        """Put a model one tier lower."""
        worker = instance.place.worker
        if instance.resident.state is ModelState.ACTIVE:
            self.doze(instance, reason)
        elif worker.freezes:
            self.board.shed(instance, self.gives(instance))
            self.actions.append(Freeze(instance.model, worker.id, reason))
        else:
            self.board.shed(instance, self.gives(instance))
            self.actions.append(Release(instance.model, worker.id, reason))

    def doze(self, instance: Instance, reason: str) -> None:
        """Have an active model sleep, after its requests."""
        self.board.doze(instance)
        worker = instance.place.worker.id
        self.actions.append(Doze(instance.model, worker, self.manners.drain_s, reason))

    def may_doze(self, instance: Instance) -> bool:
        """Whether an instance is active and nothing forbids that it sleeps."""
        view = instance.view
        return (
            instance.serves
            and view is not None
            and view.facts is not None
            and not view.spec.pin
            and view.spec.minimum_tier is not Tier.ACTIVE
            and self.commandable(instance)
        )

    def may_shed(self, instance: Instance) -> bool:
        """Whether an instance dozes and may give back its context."""
        view = instance.view
        if instance.resident.state is not ModelState.DOZING or view is None or view.facts is None:
            return False
        tier = view.spec.minimum_tier
        allowed = tier is not Tier.DOZING and tier is not Tier.ACTIVE
        if not instance.place.worker.freezes:
            allowed = allowed and tier is not Tier.FROZEN
        return allowed and not view.spec.pin and self.commandable(instance)

    def commandable(self, instance: Instance) -> bool:
        """Whether no command is in flight for it there, nor did one fail a moment ago."""
        key = (instance.place.worker.id, instance.model)
        return not instance.leaving and key not in self.board.commanded and key not in self.board.backing_off

    def is_idle(self, instance: Instance) -> bool:
        """Whether nobody uses it now or is about to."""
        resident = instance.resident
        return not resident.busy and resident.state_s >= self.manners.settle_s

    def _is_extra(self, instance: Instance) -> bool:
        """Whether the model is served by more instances than its operator asked for, and not because it is
        about to move."""
        view = instance.view
        serving = self.board.serving[instance.model] if instance.serves else []
        asked = view.spec.replicas if view is not None else 1
        return len(serving) > asked and min(one.resident.state_s for one in serving) >= MOVED_S

    def retire_surplus(
        self, wanted_count: Callable[[str, ModelView, int], int], fresh_s: float = float("inf")
    ) -> None:
        """Of a model with more active instances than are wanted, some go: how a move ends, once its target
        serves, and has done so for `settle_s`, so that routes know it. While one came up less than `fresh_s`
        ago it is such a target, and the longest active go; else those whose GPUs are under most pressure."""
        for name, instances in list(self.board.serving.items()):
            if len(instances) < 2:
                continue
            view = instances[0].view
            if view is None or view.removed:
                continue
            surplus = len(instances) - max(1, wanted_count(name, view, len(instances)))
            if surplus <= 0:
                continue
            self.board.measure()
            settled = [one for one in instances if one.resident.state_s >= self.manners.settle_s]
            target = min(one.resident.state_s for one in instances) < fresh_s
            order = sorted(instances, key=lambda one: -one.resident.state_s)
            if not target:
                order.sort(key=lambda one: -one.place.pressure)
            for instance in order[:surplus]:
                if self._may_retire(instance) and any(one is not instance for one in settled):
                    self.doze(instance, "enough instances serve elsewhere")
                    settled = [one for one in settled if one is not instance]

    def _may_retire(self, instance: Instance) -> bool:
        # Even a pinned model needs no more instances than it asks for.
        view = instance.view
        return instance.serves and view is not None and view.facts is not None and self.commandable(instance)

    def doze_the_idle(self, default_timeout_s: float | None = None) -> None:
        """Put to sleep models idle for longer than their own time-out, or the default one: all instances of a
        model or none, since those that stay would call for the others again."""
        for name, instances in list(self.board.serving.items()):
            view = instances[0].view if instances else None
            if view is None or self.snapshot.demand.get(name, NO_DEMAND).parked:
                continue
            timeout_s = view.spec.idle_timeout_s or default_timeout_s
            if timeout_s is None or min(one.resident.idle_s for one in instances) <= timeout_s:
                continue
            for instance in list(instances):
                if self.is_idle(instance) and self.may_doze(instance):
                    self.doze(instance, f"idle for more than {timeout_s:g} s")

    def release_the_removed(self) -> None:
        """Have workers forget models that are not registered any more."""
        removed = {name for name, view in self.snapshot.models.items() if view.removed and view.facts}
        for worker in (place.worker for place in self.board.places.values() if removed):
            for name in removed & worker.models.keys():
                key = (worker.id, name)
                if worker.models[name].state in _OFF_THE_DEVICE or key in self.board.commanded:
                    continue
                if key not in self.board.backing_off:
                    self.board.commanded.add(key)
                    self.actions.append(Release(name, worker.id, "not registered any more"))


def _longest_active_first(instance: Instance) -> tuple[float, float, str]:
    view = instance.view
    return (view.spec.priority if view is not None else 0, -instance.resident.state_s, instance.model)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
