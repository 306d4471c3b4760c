"""What could be done now for a model that should be somewhere: questions, which change nothing.

Which places could hold it, by what means it could come there, and who may sleep for it.
"""

import math
from typing import NamedTuple

from prism.common.messages.models import ModelState, Tier
from prism.scheduling.cost import ModelCost
from prism.scheduling.placement.actions import Note
from prism.scheduling.placement.backoff import FIRST_S
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Instance, Place
from prism.scheduling.placement.judging import Judge, Option, Step
from prism.scheduling.placement.pressure import Work, work_of
from prism.scheduling.placement.pricing import cost_on
from prism.scheduling.placement.snapshot import ClusterSnapshot, ModelView
from prism.scheduling.placement.wants import NO_DEMAND, Wanted

MOVED_S = 15.0
"""By then a model that has come up as the target of a move is alone."""


class Manners(NamedTuple):
    """How gently models are put to sleep. Requests in flight may finish within `drain_s`. A busy model must
    leave only when a request for another has waited for `patience_s`, and after `min_active_s` of being
    active. Where both are promised a first token in time, `promised_patience_s` and `longest_patience_s`
    have a say in that (`Prospects.patience_s`). One that came up less than `settle_s` ago counts as busy: the
    requests that it was woken for are still on their way. Seconds."""

    patience_s: float
    min_active_s: float
    drain_s: float
    settle_s: float
    promised_patience_s: float = 0.0
    longest_patience_s: float = 0.0


class Prospects:
    """As the board stands. `notes` gathers why models can't be where they should be."""

    def __init__(self, snapshot: ClusterSnapshot, board: Board, manners: Manners) -> None:
        self.snapshot = snapshot
        self.board = board
        self.manners = manners
        self.notes: dict[Note, None] = {}
        # The last answer of `expected_work`: of a model's places most ask for the same.
        self._expected: tuple[ModelView, ModelCost | None, int, Work] | None = None

    def note(self, model: str, text: str, *, passing: bool = False) -> None:
        """Say why a model is not where it should be."""
        self.notes[Note(model, text, passing)] = None

    def candidates(self, wanted: Wanted, judge: Judge, *, tell: bool = True) -> list[Place]:
        """Places that could hold it and whose worker may be asked to; with `tell`, why there is none is
        noted."""
        name, view, board = wanted.name, wanted.view, self.board
        tp_size = view.spec.tp_size

        def fits(place: Place) -> bool:
            return board.need_at(view, place) <= place.room

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
        large = [place for place in places if board.could_ever_fit(view, place)]
        if not large and tell:
            largest = max((place.worker for place in places), key=lambda worker: worker.limit_bytes)
            takes = board.fixed_bytes(wanted.view, largest) + board.kv_at_least(wanted.view, largest)
            self.note(
                name,
                f"too large: it takes {_gb(takes)} (weights and KV cache), the largest worker "
                f"{largest.id} has {_gb(largest.limit_bytes)}; lower its max_memory_pool_size or raise the "
                "limit",
            )
        return [place for place in large if self._may_be_asked(place, name, tell=tell)]

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

    def _may_be_asked(self, place: Place, name: str, *, tell: bool) -> bool:
        """Whether its worker has nothing else to do with the model first, nor failed with it a moment ago."""
        key = (place.worker.id, name)
        here = place.worker.models.get(name)
        if key in self.board.commanded or (here is not None and self.is_bound_elsewhere(place, name)):
            return False
        failure = self.board.backing_off.get(key)
        if failure is not None:
            if tell:
                text = f"failed on {failure.worker}, {failure.count} in a row, will retry: {failure.reason}"
                self.note(name, text, passing=True)
            return False
        return here is None or here.state is not ModelState.FAILED or here.state_s >= FIRST_S

    def option(self, wanted: Wanted, place: Place, judge: Judge) -> Option | None:
        """The gentlest way to have it there now, None if there is none yet."""
        need = self.board.need_at(wanted.view, place)
        if need <= place.room:
            return Option(place, Step.FREE, need)
        if not wanted.may_evict:
            return None
        short = [need - gpu.free + gpu.claimed - gpu.soon for gpu in place.gpus]
        if max(short) <= 0:
            return Option(place, Step.AWAIT_IDLE, need)
        sleepers = self._sleepers(wanted, place)
        if not sleepers:
            late = max([missing - gpu.late for missing, gpu in zip(short, place.gpus, strict=True)])
            return Option(place, Step.AWAIT_BUSY, need) if late <= 0 else None
        idle = [
            instance
            for instance in sleepers
            if (self.is_idle(instance) and (wanted.view.spec.pin or not judge.spares(instance)))
            or self._is_extra(instance)
        ]
        idle.sort(key=judge.victim_rank)
        chosen = self._enough(idle, place, short)
        if chosen is not None:
            return Option(place, Step.EVICT_IDLE, need, chosen)
        short = [missing - gpu.late for missing, gpu in zip(short, place.gpus, strict=True)]
        if max(short) <= 0:
            return Option(place, Step.AWAIT_BUSY, need)
        busy = [instance for instance in sleepers if instance.serves and instance not in idle]
        if wanted.demand.waited_s <= self.patience_s(wanted, place, need):
            return None
        busy.sort(key=self._least_missed_first)
        ripe = [instance for instance in busy if instance.resident.state_s >= self.manners.min_active_s]
        chosen = self._enough(idle + ripe, place, short)
        if chosen is not None:
            return Option(place, Step.EVICT_BUSY, need, chosen)
        # Keeps what comes free meanwhile from going to someone who has waited less.
        if self._enough(idle + busy, place, short) is not None:
            return Option(place, Step.AWAIT_RIPE, need)
        return None

    def patience_s(self, wanted: Wanted, place: Place, need: int) -> float:
        """How long a request for `wanted` waits before busy models must leave for it at `place`, where it
        takes `need` bytes of each GPU. Seconds.

        Where all of them are promised first tokens in time, it is late by then, and keeps no promise by
        coming up; those who leave will break theirs. So it waits in proportion to the requests that so much
        memory serves there for each one that the model brings: a large model that few ask for waits longest.
        """
        manners = self.manners
        if manners.longest_patience_s <= manners.patience_s or not is_promised(wanted.view):
            return manners.patience_s
        serving = [one.view for gpu in place.gpus for one in gpu.instances if one.serves]
        if not all(map(is_promised, serving)):
            return manners.patience_s
        serves = sum(gpu.requests_per_s * need / gpu.limit for gpu in place.gpus if gpu.limit)
        brings = self.expected_work(wanted.view, place).requests_per_s * len(place.gpus)
        promised_s = manners.promised_patience_s * (serves / brings if brings > 0 else math.inf)
        return max(manners.patience_s, min(promised_s, manners.longest_patience_s))

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

    def expected_work(self, view: ModelView, place: Place, *, replaces: bool = False) -> Work:
        """The work of one more instance at `place`, or of the only one if it `replaces` another."""
        name, board = view.spec.model_name, self.board
        others = 0 if replaces else len(board.serving.get(name, ())) + len(board.rising.get(name, ()))
        cost = cost_on(view, place.worker)
        known = self._expected
        if known is not None and known[0] is view and known[1] is cost and known[2] == others:
            return known[3]
        work = work_of(view, cost, None, 1.0 / (1 + others))
        self._expected = (view, cost, others, work)
        return work

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

    def _least_missed_first(self, instance: Instance) -> tuple[float, ...]:
        """Of those that are not put to sleep lightly: lower priority first, then who only pauses, then the
        longest active."""
        priority = instance.view.spec.priority if instance.view is not None else 0
        return (priority, not self.is_idle(instance), -instance.resident.state_s)

    def is_called_for_again(self, instance: Instance) -> bool:
        """Whether the operator asked for so many replicas that, put to sleep, this one would come back into
        the memory that it left, before those who move do."""
        view = instance.view
        return view is not None and 1 < view.spec.replicas >= len(self.board.serving[instance.model])

    def _is_extra(self, instance: Instance) -> bool:
        """Whether the model is served by more instances than its operator asked for, and not because it is
        about to move."""
        view = instance.view
        serving = self.board.serving[instance.model] if instance.serves else []
        asked = view.spec.replicas if view is not None else 1
        return len(serving) > asked and min(one.resident.state_s for one in serving) >= MOVED_S


def is_promised(view: ModelView | None) -> bool:
    """Whether the model's requests are promised a first token within some time."""
    return view is not None and view.spec.ttft_slo_ms is not None


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
