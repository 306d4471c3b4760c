"""From where models should be to what can safely be done now: shared by all policies that place and move.

What a plan can't do yet it claims memory for, and a later plan, which sees the memory free, goes on: nothing
is remembered between plans.
"""

from collections.abc import Callable

from prism.common.messages.models import ModelState
from prism.scheduling.placement.actions import Action, Activate, Doze, Freeze, Plan, Release
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Instance, Place
from prism.scheduling.placement.judging import Judge, Option, Step
from prism.scheduling.placement.nearest import places_within
from prism.scheduling.placement.pricing import sizes_on
from prism.scheduling.placement.prospects import Manners, Prospects
from prism.scheduling.placement.snapshot import ClusterSnapshot, ModelView
from prism.scheduling.placement.wants import NO_DEMAND, Wanted

UNASKED_SHARE = 0.125
"""No more moves at a time, nor models woken ahead, than this share of the GPUs, and at least one: a move
takes memory twice, and all of them share the bus with those that requests wait for."""

_OFF_THE_DEVICE = frozenset({ModelState.COLD, ModelState.STAGED})


class Reconciler(Prospects):
    """One plan in the making."""

    def __init__(self, snapshot: ClusterSnapshot, board: Board, manners: Manners) -> None:
        super().__init__(snapshot, board, manners)
        self.actions: list[Action] = []

    def plan(self) -> Plan:
        """What has come together."""
        return Plan(tuple(self.actions), tuple(self.notes))

    def place(self, wanted: Wanted, judge: Judge) -> Option | None:
        """Have `wanted` come up at the best place, or come nearer to it; returns what was chosen."""
        places = self.candidates(wanted, judge)
        options = [option for place in places if (option := self.option(wanted, place, judge)) is not None]
        if min((option.step for option in options), default=Step.AWAIT_RIPE) > Step.EVICT_IDLE:
            self._unbind(wanted, judge)
        if options:
            options.sort(key=lambda option: judge.option_rank(wanted, option))
            refusals: list[str] = []
            for option in options:
                refusal = judge.refuses(wanted, option)
                if refusal is None:
                    self.take(wanted, option)
                    return option
                refusals.append(refusal)
            self.note(wanted.name, refusals[0], passing=True)
            return None
        if places:
            evicts = "waits for memory that busy or pinned models hold"
            text = evicts if wanted.may_evict else f"waits for free memory ({wanted.reason})"
            self.note(wanted.name, text, passing=True)
        return None

    def _unbind(self, wanted: Wanted, judge: Judge) -> None:
        """Let go of an engine that sleeps on a GPU without room while another of its worker has some."""
        for instance in self.board.asleep.get(wanted.name, ()):
            whole = self.board.places[instance.place.worker.id]
            if len(whole.gpus) <= wanted.view.spec.tp_size:
                continue
            if not self.may_shed(instance):
                continue
            for place in places_within(whole, wanted.view.spec.tp_size, judge.gpu_rank):
                option = self.option(wanted, place, judge) if place.gpus != instance.place.gpus else None
                if option is not None and option.step <= Step.EVICT_IDLE:
                    self.board.shed(instance, self.gives(instance))
                    reason = f"comes up on another GPU: {wanted.reason}"
                    self.actions.append(Release(wanted.name, whole.worker.id, reason))
                    return

    def take(self, wanted: Wanted, option: Option) -> None:
        """Do what an option says."""
        if option.step is Step.FREE:
            self.activate(wanted, option.place)
            return
        for victim in option.victims:
            self.sink(victim, f"memory for {wanted.name}: {wanted.reason}")
        for gpu in option.place.gpus:
            gpu.claimed += option.need

    def bring_up(self, wanted: Wanted, judge: Judge, accept: Callable[[Option], bool]) -> bool:
        """Have it come up at the best place that is acceptable; in silence if there is none."""
        options = [
            option
            for place in self.candidates(wanted, judge, tell=False)
            if (option := self.option(wanted, place, judge)) is not None and accept(option)
        ]
        if not options:
            return False
        self.take(wanted, min(options, key=lambda one: judge.option_rank(wanted, one)))
        return True

    @property
    def most_unasked(self) -> int:
        """No more models than this are brought up at a time that nobody waits for."""
        return max(1, int(len(self.board.gpus) * UNASKED_SHARE))

    def activate(self, wanted: Wanted, place: Place) -> None:
        """Bring a model up where memory is free."""
        board, view, worker = self.board, wanted.view, place.worker
        need = board.need(view, worker)
        kv = board.kv_at_least(view, worker)
        if worker.elastic:
            spare = place.room - need
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
            for name in worker.models:
                key = (worker.id, name)
                if name not in removed:
                    continue
                if worker.models[name].state in _OFF_THE_DEVICE or key in self.board.commanded:
                    continue
                if key not in self.board.backing_off:
                    self.board.commanded.add(key)
                    self.actions.append(Release(name, worker.id, "not registered any more"))
