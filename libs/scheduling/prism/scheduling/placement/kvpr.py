"""The paper's placement by KV pressure ratio, with what its printed form lacks."""

from collections.abc import Iterator
from dataclasses import dataclass

from prism.scheduling.memory import kv_bytes_per_token
from prism.scheduling.placement.actions import Plan
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Gpu, Instance, Place
from prism.scheduling.placement.judging import Option, Step
from prism.scheduling.placement.pressure import DEFAULT_TPOT_S
from prism.scheduling.placement.prospects import Manners
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import ClusterSnapshot, ModelView, WorkerView
from prism.scheduling.placement.wants import Wanted, wanted_models


@dataclass(frozen=True)
class KvprPlacement:
    """Algorithm 1 of Prism (arXiv 2505.04021, section 6.1): models by weighted token rate, highest first,
    each to the GPU of least KV pressure ratio (KVPR); it moves only if the ratio where it is, within the plan
    made so far, is higher by more than `tau`.

    KVPR = sum of token_rate * token_size / TPOT_SLO over the GPU's models / its memory beside weights.
    Idle models sleep after `idle_s` (about 45 s is the paper's best), earlier when others need their memory,
    longest idle first. A model that is asked for comes up at once on the GPU of least KVPR.

    Added to the printed form: a model only goes where its weights and a floor of KV cache fit; `tau`, for
    which no value is published, is a share of the higher ratio, since the ratio's scale depends on the
    models; and nobody moves before `min_stay_s`. The rest is as for LruPlacement. Seconds throughout.
    """

    patience_s: float = 2.0
    min_active_s: float = 5.0
    drain_s: float = 60.0
    settle_s: float = 0.5
    home_patience_s: float = 15.0
    idle_s: float = 45.0
    tau: float = 0.25
    min_stay_s: float = 15.0

    @property
    def manners(self) -> Manners:
        """See Judging."""
        return Manners(self.patience_s, self.min_active_s, self.drain_s, self.settle_s)

    def foresees(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """See Judging: as it is."""
        return snapshot

    def judge(self, reconciler: Reconciler) -> "KvprJudge":
        """See Judging."""
        return KvprJudge(reconciler.board)

    def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
        """See PlacementPolicy."""
        reconciler = Reconciler(snapshot, Board(snapshot, now), self.manners)
        judge = self.judge(reconciler)
        wants, notes = wanted_models(snapshot, self.home_patience_s)
        reconciler.notes.update(dict.fromkeys(notes))
        for wanted in wants:
            option = reconciler.place(wanted, judge)
            if option is not None:
                judge.goes_to(wanted.view, option.place)
        reconciler.retire_surplus(lambda name, view, active: view.spec.replicas)
        reconciler.doze_the_idle(self.idle_s)
        reconciler.release_the_removed()
        if snapshot.balance:
            for instance, place in self._targets(reconciler, judge):
                self._move(reconciler, judge, instance, place)
        return reconciler.plan()

    def _targets(self, reconciler: Reconciler, judge: "KvprJudge") -> Iterator[tuple[Instance, Place]]:
        """Algorithm 1: the models that should be elsewhere than they are, and where."""
        board = reconciler.board
        models = [instance for found in board.serving.values() if len(found) == 1 for instance in found]
        rates = {id(one): weighted_rate(one.view, one.place.worker) for one in models if one.view is not None}
        models = [one for one in models if id(one) in rates]
        models.sort(key=lambda one: (-rates[id(one)], one.model))
        plan = _PartialPlan(board)
        for instance in models:
            view, rate = instance.view, rates[id(instance)]
            assert view is not None
            best = self._best(board, plan, instance, view) if rate > 0 else None
            if best is not None:
                plan.add(best, rate, board.fixed_bytes(view, best.worker))
                if best.worker is not instance.place.worker:
                    yield instance, best
            else:
                plan.add(instance.place, rate, instance.resident.weights_bytes)

    def _best(self, board: Board, plan: "_PartialPlan", instance: Instance, view: ModelView) -> Place | None:
        """Where the ratio is lower by enough, and lowest."""
        here = plan.ratio(instance.place)
        if here <= 0:
            return None

        def fits(place: Place) -> bool:
            need = board.fixed_bytes(view, place.worker) + board.kv_at_least(view, place.worker)
            return all(need <= plan.space[id(gpu)] for gpu in place.gpus)

        places = [
            (ratio, place.worker.id, place)
            for place in board.places_for(view, plan.gpu_ratio, fits)
            if here - (ratio := plan.ratio(place)) > self.tau * here and fits(place)
        ]
        return min(places, key=lambda each: each[:2], default=(0.0, "", None))[2]

    def _move(self, reconciler: Reconciler, judge: "KvprJudge", instance: Instance, place: Place) -> None:
        view = instance.view
        if view is None or view.facts is None or view.removed or view.spec.pin:
            return
        if instance.resident.state_s < self.min_stay_s or reconciler.board.rising.get(instance.model):
            return
        key = (place.worker.id, instance.model)
        if not reconciler.commandable(instance) or key in reconciler.board.commanded:
            return
        if key in reconciler.board.backing_off or reconciler.is_bound_elsewhere(place, instance.model):
            return
        reason = f"moves from {instance.place.worker.id}: KV pressure ratio"
        wanted = Wanted(instance.model, view, reason, moves_from=instance.place.worker.id)
        option = reconciler.option(wanted, place, judge)
        if option is None or any(map(reconciler.is_called_for_again, option.victims)):
            return
        if option.step <= Step.EVICT_IDLE:
            reconciler.take(wanted, option)


def weighted_rate(view: ModelView, worker: WorkerView) -> float:
    """Token rate times KV bytes per token over the objective per token: bytes per second squared."""
    if view.facts is None:
        return 0.0
    traffic, spec = view.traffic, view.spec
    token = kv_bytes_per_token(view.facts, worker.element_bytes, spec.tp_size)
    tpot_s = spec.tpot_slo_ms / 1000.0 if spec.tpot_slo_ms is not None else DEFAULT_TPOT_S
    return (traffic.prompt_tokens_per_s + traffic.output_tokens_per_s) * token / tpot_s


class _PartialPlan:
    """Algorithm 1's w and shared_kv of every GPU, while it assigns models to empty GPUs."""

    def __init__(self, board: Board) -> None:
        self._rates = {id(gpu): 0.0 for gpu in board.gpus}
        self.space = {id(gpu): gpu.limit for gpu in board.gpus}

    def gpu_ratio(self, gpu: Gpu) -> float:
        return self._rates[id(gpu)] / max(1, self.space[id(gpu)])

    def ratio(self, place: Place) -> float:
        gpus = place.gpus
        return self.gpu_ratio(gpus[0]) if len(gpus) == 1 else max(self.gpu_ratio(gpu) for gpu in gpus)

    def add(self, place: Place, rate: float, nbytes: int) -> None:
        for gpu in place.gpus:
            self._rates[id(gpu)] += rate
            self.space[id(gpu)] -= nbytes


class KvprJudge:
    """Ranks by KVPR as it is now, and puts the longest idle to sleep first."""

    def __init__(self, board: Board) -> None:
        self._rates: dict[int, float] = {}
        for found in (*board.serving.values(), *board.rising.values()):
            for instance in found:
                if instance.view is not None:
                    self._add(instance.view, instance.place, 1.0 / len(found))

    def goes_to(self, view: ModelView, place: Place) -> None:
        """Count a model that was just placed."""
        self._add(view, place, 1.0)

    def _add(self, view: ModelView, place: Place, share: float) -> None:
        rate = weighted_rate(view, place.worker) * share
        for gpu in place.gpus:
            self._rates[id(gpu)] = self._rates.get(id(gpu), 0.0) + rate

    def gpu_rank(self, gpu: Gpu) -> float:
        """See Judge."""
        return self._rates.get(id(gpu), 0.0) / max(1, gpu.kv_space)

    def option_rank(self, wanted: Wanted, option: Option) -> tuple[float, ...]:
        """See Judge: the gentlest way first, then least KVPR, then most free memory."""
        ratio = max(self.gpu_rank(gpu) for gpu in option.place.gpus)
        return (not option.place.worker.ready, option.step, ratio, -min(g.free for g in option.place.gpus))

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
