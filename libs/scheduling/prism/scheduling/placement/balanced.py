"""The default policy: least maximum pressure, where pressure is the worse of KV cache and compute.

Of Prism's own making. It differs from the paper's KVPR (arXiv 2505.04021, section 6.1) in what an independent
reproduction found missing there: compute counts as much as memory, relative to the models' objectives; a move
must earn what it costs; and an idle model stays resident for as long as nobody needs its memory more.

Everything is weighed in seconds that requests probably wait:
- a place: until the model serves there (by its tier), plus the queueing at the GPU's pressure, plus what the
  models that must sleep for it will lose;
- a sleeping model: its chance to return (`chance_to_return`) times what waking it then takes. Of idle models
  those go first that lose least per byte (as in GreedyDual-Size caching; Cao and Irani, USITS 1997);
- a move: the pressure that it takes off the fuller of the two GPUs.

Where there is not enough for all, it goes by the requests that keep their objectives instead (`attainment`).
While GPUs have time, models take turns in their memory, as long as each can be back within its objective for
the first token. Where they have none, a model that takes more from others than it brings waits, the longer
the more of them its memory serves.

Placing is greedy, most pressing first; balancing is a local search over single moves, each of which lowers
the higher of two pressures by a margin, so that the search ends and nothing flaps.
"""

from dataclasses import dataclass

from prism.common.messages.models import ModelState, Tier
from prism.scheduling.placement.actions import Plan
from prism.scheduling.placement.anticipation import Anticipation
from prism.scheduling.placement.attainment import felt, gain_of
from prism.scheduling.placement.balancing import Balancing
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.expected_load import with_expected_load
from prism.scheduling.placement.gpus import Gpu, Instance
from prism.scheduling.placement.judging import Option, Step
from prism.scheduling.placement.pressure import waiting_s
from prism.scheduling.placement.pricing import chance_to_return, cost_on, ready_s, tier_of
from prism.scheduling.placement.prospects import Manners, is_promised
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import ClusterSnapshot
from prism.scheduling.placement.wants import Wanted, wanted_models

_LEAVE_S = 0.1
_BUSY_LEAVE_S = 2.0
_NOBODYS = 1e-9


@dataclass(frozen=True)
class BalancedPlacement:
    """Places by memory and compute pressure, keeps models resident while memory is free, moves and
    replicates hot ones. Seconds, and shares of a GPU.

    Busy models make room only when a request has waited for `patience_s`, and after `min_active_s` of being
    active; requests in flight finish within `drain_s`. A model that came up less than `settle_s` ago counts
    as busy. `horizon_s` is how far ahead it looks: for a sleeping model's return, and for a move to pay.

    Where all concerned are promised a first token in time, patience is `promised_patience_s` for each request
    that the memory serves for one that the model brings, up to `longest_patience_s` (see
    `Prospects.patience_s`). Until then, where pressure as it is felt is more than `withhold_above`, it also
    waits if, of the requests that it brings, less than the share `least_gain` would be on time beyond those
    that others lose by it. An idle one of them that could be
    back within the share `back_within` of its objective loses nothing by giving its memory away, as long as
    pressure as it is felt (`attainment.felt`) is at most `turns_below`; beyond that nobody takes turns.

    A move must lower the higher of two GPUs' pressures by `margin`, or `free_margin` where nobody must sleep
    for it, starts only where pressure as it is felt is above `comfortable`, and not before the model has been
    where it is for `min_stay_s`. A model whose work alone fills more than `replicate_above` of each
    instance's GPU gets one more, up to `most_replicas`; one goes when the others would then be below
    `retire_below`. Where KV cache is short by `kv_short`, idle neighbours sleep for it whose chance to return
    is below `doubtful`. Models likelier than `likely` to return are woken ahead into memory that is free. An
    idle one that is asked for again within `pause_s` with a chance above `pausing` only pauses: unless it
    could be back in time it is left alone as a busy one is. Models that were never up are started once while
    memory is free, so that they doze; contexts take no more than `context_share` of a GPU by that.
    """

    patience_s: float = 2.0
    promised_patience_s: float = 20.0
    longest_patience_s: float = 60.0
    min_active_s: float = 5.0
    drain_s: float = 60.0
    settle_s: float = 0.5
    home_patience_s: float = 15.0
    horizon_s: float = 30.0
    margin: float = 0.3
    free_margin: float = 0.2
    comfortable: float = 0.74
    min_stay_s: float = 15.0
    replicate_above: float = 0.75
    retire_below: float = 0.45
    most_replicas: int = 8
    kv_short: float = 0.9
    doubtful: float = 0.5
    likely: float = 0.2
    context_share: float = 0.3
    pause_s: float = 5.0
    pausing: float = 0.2
    least_gain: float = 0.3
    withhold_above: float = 0.7
    back_within: float = 1.0
    turns_below: float = 1.0

    @property
    def manners(self) -> Manners:
        """See Judging."""
        return Manners(
            self.patience_s,
            self.min_active_s,
            self.drain_s,
            self.settle_s,
            self.promised_patience_s,
            self.longest_patience_s,
        )

    def foresees(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """See Judging: with the load that is to be expected."""
        return with_expected_load(snapshot)

    def judge(self, reconciler: Reconciler) -> "BalancedJudge":
        """See Judging."""
        return BalancedJudge(self, reconciler)

    def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
        """See PlacementPolicy."""
        snapshot = self.foresees(snapshot)
        reconciler = Reconciler(snapshot, Board(snapshot, now), self.manners)
        judge = self.judge(reconciler)
        wants, notes = wanted_models(snapshot, self.home_patience_s)
        reconciler.notes.update(dict.fromkeys(notes))
        if wants:
            reconciler.board.measure()
            for wanted in wants:
                reconciler.place(wanted, judge)
        balancing = Balancing(reconciler, judge, self)
        reconciler.retire_surplus(balancing.instances_wanted, self.min_stay_s)
        reconciler.doze_the_idle()
        reconciler.release_the_removed()
        if snapshot.balance:
            reconciler.board.measure()
            balancing.go_home()
            balancing.replicate()
            balancing.move()
            balancing.make_kv_room()
            anticipation = Anticipation(reconciler, judge, self)
            anticipation.wake_ahead()
            anticipation.prepare()
        return reconciler.plan()


class BalancedJudge:
    """Weighs places and victims in seconds, for one plan."""

    def __init__(self, policy: BalancedPlacement, reconciler: Reconciler) -> None:
        self.policy = policy
        self.reconciler = reconciler

    def gpu_rank(self, gpu: Gpu) -> float:
        """See Judge: least pressure, then most free memory."""
        return gpu.pressure - 1e-3 * gpu.free / (gpu.limit or 1)

    def option_rank(self, wanted: Wanted, option: Option) -> tuple[float, ...]:
        """See Judge: seconds until it serves and while it does, and what others lose."""
        waits = option.step in (Step.AWAIT_BUSY, Step.EVICT_BUSY, Step.AWAIT_RIPE)
        gpus = option.place.gpus
        free = gpus[0].free if len(gpus) == 1 else min([gpu.free for gpu in gpus])
        unready = not option.place.worker.ready
        return (unready, waits, self.seconds(wanted, option), -free)

    def seconds(self, wanted: Wanted, option: Option) -> float:
        """What a request for the model probably waits there, and what others will wait for it."""
        worker = option.place.worker
        here = worker.models.get(wanted.name)
        total = ready_s(wanted.view, worker, tier_of(here)) + waiting_s(self.pressure(wanted, option))
        if option.step is not Step.FREE:
            total += _LEAVE_S if option.step <= Step.EVICT_IDLE else _BUSY_LEAVE_S
        if option.victims:
            total += sum([self.loss_s(victim) for victim in option.victims])
        return total

    def pressure(self, wanted: Wanted, option: Option) -> float:
        """The highest pressure among its GPUs once it is there and the victims are gone."""
        work = self.reconciler.expected_work(wanted.view, option.place)
        return option.pressure_with(work, self.reconciler.board.fixed_at(wanted.view, option.place))

    def loss_s(self, instance: Instance) -> float:
        """Seconds that requests will probably wait because it was put one tier lower."""
        view, worker = instance.view, instance.place.worker
        assert view is not None
        awake = instance.resident.state is ModelState.ACTIVE
        before = Tier.ACTIVE if awake else Tier.DOZING
        after = Tier.DOZING if awake else Tier.FROZEN if worker.freezes else Tier.STAGED
        idle_s = min(view.traffic.last_arrival_s, instance.resident.idle_s)
        chance = chance_to_return(view, idle_s, self.policy.horizon_s)
        if instance.resident.busy:
            chance = 1.0
        loss = chance * (ready_s(view, worker, after) - ready_s(view, worker, before))
        if awake and len(self.reconciler.board.serving.get(instance.model, ())) > 1:
            # The others serve on; what is lost is speed.
            loss *= 0.5
        return max(0.0, loss)

    def refuses(self, wanted: Wanted, option: Option) -> str | None:
        """See Judge: as long as nobody has waited for longer than is promised, one that would take nearly as
        much from the others as it gets, or that would have others sleep where nobody takes turns. Not one of
        a higher priority than another there."""
        spec, demand, place = wanted.view.spec, wanted.demand, option.place
        if not demand.parked or spec.pin or spec.minimum_tier is Tier.ACTIVE:
            return None
        there = [one.view for gpu in place.gpus for one in gpu.instances if one.serves]
        if not all(map(is_promised, [wanted.view, *there])):
            return None
        if any(view is not None and view.spec.priority < spec.priority for view in there):
            return None
        if demand.waited_s > self.reconciler.patience_s(wanted, place, option.need):
            return None
        if all(gpu.requests_per_s < _NOBODYS for gpu in place.gpus):
            return None
        if option.victims and not all(map(self._has_time, place.gpus)):
            return "waits: its GPUs have more work than they can do in time, so nobody sleeps for it yet"
        if all(felt(gpu.pressure, gpu.queued) <= self.policy.withhold_above for gpu in place.gpus):
            return None
        work = self.reconciler.expected_work(wanted.view, place)
        fixed = self.reconciler.board.fixed_bytes(wanted.view, place.worker)
        in_turns = [one for one in option.victims if self._can_be_back(one)]
        gone = [one for one in option.victims if one not in in_turns]
        gain = gain_of(place, work, fixed, gone, in_turns)
        brings = work.requests_per_s * len(place.gpus)
        if gain >= self.policy.least_gain * brings:
            return None
        return f"waits: of {brings:.2g} requests a second that it brings " + (
            f"only {gain:.2g} more would be on time" if gain > 0 else "none more would be on time"
        )

    def _has_time(self, gpu: Gpu) -> bool:
        return felt(gpu.pressure, gpu.queued) <= self.policy.turns_below

    def _can_be_back(self, instance: Instance) -> bool:
        """Whether, put to sleep now and asked for again, it would still give a first token in time, as far
        as anybody knows."""
        view, worker = instance.view, instance.place.worker
        if view is None or view.spec.ttft_slo_ms is None or not self.reconciler.is_idle(instance):
            return False
        if cost_on(view, worker) is None:
            return False
        if not all(map(self._has_time, instance.place.gpus)):
            return False
        allowed_s = self.policy.back_within * view.spec.ttft_slo_ms / 1000.0
        return _LEAVE_S + ready_s(view, worker, Tier.DOZING) < allowed_s

    def spares(self, instance: Instance) -> bool:
        """See Judge: one that pauses, will probably be asked for again at once, and can't be back in time."""
        view = instance.view
        if view is None or instance.resident.state is not ModelState.ACTIVE or self._can_be_back(instance):
            return False
        idle_s = min(view.traffic.last_arrival_s, instance.resident.idle_s)
        return chance_to_return(view, idle_s, self.policy.pause_s) > self.policy.pausing

    def victim_rank(self, instance: Instance) -> tuple[float, ...]:
        """See Judge: lower priority first, then who loses least per byte."""
        view = instance.view
        assert view is not None
        known = instance.place.worker.profile is not None
        gives = max(1, self.reconciler.gives(instance)) if known else 1
        return (view.spec.priority, self.loss_s(instance) / gives, -instance.resident.idle_s)
