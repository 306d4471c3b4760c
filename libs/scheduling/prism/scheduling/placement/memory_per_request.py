"""The heuristic of the paper's released prototype: go where most memory is free per waiting request."""

from dataclasses import dataclass

from prism.scheduling.placement.actions import Plan
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Gpu, Instance, Place
from prism.scheduling.placement.judging import Option, Step
from prism.scheduling.placement.prospects import Manners
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import ClusterSnapshot
from prism.scheduling.placement.wants import Wanted, wanted_models


@dataclass(frozen=True)
class MemoryPerRequestPlacement:
    """Places a model on the GPU with most free memory per request that is queued or running there, and moves
    a model with queued requests from the GPU with least to that with most, if that has `factor` times as
    much.

    The prototype released with Prism (arXiv 2505.04021) decides like this, not by the paper's Algorithm 1. It
    waits for a tick of 5 s; here demand is answered at once, and its moves keep the source until the target
    serves, which is to its advantage. Idle models sleep after `idle_s`, and for others, longest idle first.
    The rest is as for LruPlacement. Seconds throughout.
    """

    patience_s: float = 2.0
    min_active_s: float = 5.0
    drain_s: float = 60.0
    settle_s: float = 0.5
    home_patience_s: float = 15.0
    idle_s: float = 45.0
    factor: float = 2.0
    min_stay_s: float = 15.0

    @property
    def manners(self) -> Manners:
        """See Judging."""
        return Manners(self.patience_s, self.min_active_s, self.drain_s, self.settle_s)

    def foresees(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """See Judging: as it is."""
        return snapshot

    def judge(self, reconciler: Reconciler) -> "MemoryPerRequestJudge":
        """See Judging."""
        return MemoryPerRequestJudge()

    def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
        """See PlacementPolicy."""
        reconciler = Reconciler(snapshot, Board(snapshot, now), self.manners)
        judge = self.judge(reconciler)
        wants, notes = wanted_models(snapshot, self.home_patience_s)
        reconciler.notes.update(dict.fromkeys(notes))
        for wanted in wants:
            reconciler.place(wanted, judge)
        reconciler.retire_surplus(lambda name, view, active: view.spec.replicas)
        reconciler.doze_the_idle(self.idle_s)
        reconciler.release_the_removed()
        if snapshot.balance:
            self._move_one(reconciler, judge)
        return reconciler.plan()

    def _move_one(self, reconciler: Reconciler, judge: "MemoryPerRequestJudge") -> None:
        board = reconciler.board
        if len(board.gpus) < 2 or any(board.rising.values()):
            return
        crowded = min(board.gpus, key=lambda gpu: (memory_per_request(gpu), gpu.worker.id, gpu.id))
        waiting = [
            one
            for one in crowded.instances
            if one.serves
            and one.view is not None
            and one.view.facts is not None
            and not one.view.spec.pin
            and one.resident.queued > 0
            and one.resident.state_s >= self.min_stay_s
            and len(board.serving[one.model]) == 1
            and reconciler.commandable(one)
        ]
        for instance in sorted(waiting, key=lambda one: (-one.resident.queued, one.model)):
            if self._move(reconciler, judge, instance, memory_per_request(crowded)):
                return

    def _move(
        self, reconciler: Reconciler, judge: "MemoryPerRequestJudge", instance: Instance, has: float
    ) -> bool:
        view, source = instance.view, instance.place.worker.id
        assert view is not None
        reason = f"moves from {source}: more memory per request"
        wanted = Wanted(
            instance.model, view, reason, may_evict=False, beside=frozenset({source}), moves_from=source
        )
        places = reconciler.candidates(wanted, judge, tell=False)
        asks = 1 + instance.resident.queued + instance.resident.running
        options = [
            option
            for place in places
            if (option := reconciler.option(wanted, place, judge)) is not None
            and option.step is Step.FREE
            and _after(place, option.need, asks) >= self.factor * max(1.0, has)
        ]
        if not options:
            return False
        reconciler.take(wanted, min(options, key=lambda option: judge.option_rank(wanted, option)))
        return True


def memory_per_request(gpu: Gpu) -> float:
    """Free bytes for each request that is queued or running there, and for one more."""
    requests = sum(one.resident.queued + one.resident.running for one in gpu.instances)
    return max(0, gpu.free) / (1 + requests)


def _after(place: Place, need: int, asks: int) -> float:
    """The same once a model that takes `need` bytes is there with its requests."""
    return min(
        max(0, gpu.free - need)
        / (asks + sum(one.resident.queued + one.resident.running for one in gpu.instances))
        for gpu in place.gpus
    )


class MemoryPerRequestJudge:
    """Ranks by free memory per request, and puts the longest idle to sleep first."""

    def gpu_rank(self, gpu: Gpu) -> float:
        """See Judge."""
        return -memory_per_request(gpu)

    def option_rank(self, wanted: Wanted, option: Option) -> tuple[float, ...]:
        """See Judge: the gentlest way first, then most memory per request."""
        least = min(memory_per_request(gpu) for gpu in option.place.gpus)
        return (not option.place.worker.ready, option.step, -least)

    def refuses(self, wanted: Wanted, option: Option) -> str | None:
        """See Judge: never."""
        return None

    def spares(self, instance: Instance) -> bool:
        """See Judge: nobody."""
        return False

    def victim_rank(self, instance: Instance) -> tuple[float, ...]:
        """See Judge."""
        priority = instance.view.spec.priority if instance.view is not None else 0
        return (priority, -instance.resident.idle_s)
