"""Evening out pressure between GPUs: moves, replicas, and room for the KV cache of busy models."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from prism.scheduling.placement.attainment import felt
from prism.scheduling.placement.gpus import Gpu, Instance
from prism.scheduling.placement.judging import Judge, Option, Step
from prism.scheduling.placement.pressure import work_of
from prism.scheduling.placement.pricing import chance_to_return, cost_on, ready_s, tier_of
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import ModelView
from prism.scheduling.placement.wants import Wanted

if TYPE_CHECKING:
    from prism.scheduling.placement.balanced import BalancedPlacement


class Move(NamedTuple):
    """An instance's way to another place. `after` is the higher pressure of the two then."""

    instance: Instance
    option: Option
    after: float
    gain: float


class Balancing:
    """A local search over single steps, each of which lowers the higher of two pressures by a margin.

    That margin is the hysteresis: the way back would have to lower the higher pressure again, so with
    unchanged traffic no model goes back and forth, and the search ends.
    """

    def __init__(self, reconciler: Reconciler, judge: Judge, policy: "BalancedPlacement") -> None:
        self._reconciler = reconciler
        self._board = reconciler.board
        self._judge = judge
        self._policy = policy

    def instances_wanted(self, name: str, view: ModelView, active: int) -> int:
        """How many of a model's `active` instances to keep."""
        asked = view.spec.replicas
        if active <= asked:
            return active
        if view.spec.pin:
            # Its operator says where it is, and how often.
            return asked
        keep = active
        while (
            keep > asked
            and self._alone(view, self._board.serving[name][0], keep - 1) < self._policy.retire_below
        ):
            keep -= 1
        return keep

    def _alone(self, view: ModelView, instance: Instance, instances: int) -> float:
        """The compute pressure of the model on each GPU, were there so many instances."""
        cost = cost_on(view, instance.place.worker)
        return work_of(view, cost, instance.resident, 1.0 / instances).compute

    def replicate(self) -> None:
        """One more instance of each model that is too much for the GPUs of those it has."""
        policy, board = self._policy, self._board
        for name, instances in list(board.serving.items()):
            if not instances or board.rising.get(name) or len(instances) >= policy.most_replicas:
                continue
            instance = instances[0]
            view = instance.view
            if view is None or view.removed or view.facts is None or view.spec.pin:
                continue
            if max(one.work.compute for one in instances) <= policy.replicate_above:
                continue
            if instance.place.pressure <= policy.replicate_above:
                continue
            beside = frozenset(one.place.worker.id for one in instances)
            wanted = Wanted(name, view, "too much work for one GPU", may_evict=False, beside=beside)
            if self._others(beside):
                self._reconciler.bring_up(
                    wanted, self._judge, lambda option: option.place.pressure < policy.replicate_above
                )

    def _others(self, beside: Iterable[str]) -> bool:
        return bool(self._board.places.keys() - set(beside))

    def go_home(self) -> None:
        """Move pinned models that serve elsewhere than their operator says to where he says."""
        board, reconciler = self._board, self._reconciler
        for name, instances in list(board.serving.items()):
            view = instances[0].view if len(instances) == 1 else None
            if view is None or view.removed or view.facts is None or not view.spec.pin:
                continue
            placement = next(iter(view.spec.init_placements), None)
            source = instances[0].place
            if placement is None or board.rising.get(name):
                continue
            named = frozenset(placement.gpu_ids)
            home = frozenset(
                worker for worker, whole in board.places.items() if named <= set(whole.worker.gpu_ids)
            )
            if not home or source.worker.id in home or not reconciler.commandable(instances[0]):
                continue
            reason = f"moves from {source.worker.id} to GPU ids {placement.gpu_ids}, where it is pinned"
            wanted = Wanted(
                name, view, reason, home=home, gpu_ids=tuple(placement.gpu_ids), moves_from=source.worker.id
            )
            self._reconciler.bring_up(wanted, self._judge, self._hinders_nobody)

    def _hinders_nobody(self, option: Option) -> bool:
        again = any(map(self._reconciler.is_called_for_again, option.victims))
        return option.step <= Step.EVICT_IDLE and not again

    def move(self) -> None:
        """Take models from the GPUs under most pressure to others, the best move of each GPU."""
        most = self._reconciler.most_unasked
        moves = sum(1 for instances in self._board.rising.values() if instances)
        pressed = [
            gpu for gpu in self._board.gpus if felt(gpu.pressure, gpu.queued) > self._policy.comfortable
        ]
        pressed.sort(key=lambda gpu: (-felt(gpu.pressure, gpu.queued), gpu.worker.id, gpu.id))
        for gpu in pressed:
            if moves >= most:
                return
            best = self.best_move(gpu)
            if best is not None:
                self._start(best)
                moves += 1

    def best_move(self, gpu: Gpu) -> Move | None:
        """The move away from `gpu` that lowers the higher pressure most, if any does by enough."""
        moves = [move for instance in gpu.instances for move in self.moves_of(instance)]
        enough = [move for move in moves if move.gain > 0]
        return max(enough, key=lambda move: (move.gain, move.instance.model), default=None)

    def moves_of(self, instance: Instance) -> list[Move]:
        """All places that an instance could go to now, with what it would gain, whether or not enough."""
        if not self._movable(instance):
            return []
        view = instance.view
        assert view is not None
        reconciler, board, policy = self._reconciler, self._board, self._policy
        beside = frozenset(one.place.worker.id for one in board.serving[instance.model])
        if not self._others(beside):
            return []
        before = instance.place.pressure
        wanted = Wanted(instance.model, view, f"evens out {before:.2f} of pressure", beside=beside)
        left = max(self._without(gpu, instance) for gpu in instance.place.gpus)
        found = []
        for place in reconciler.candidates(wanted, self._judge, tell=False):
            option = reconciler.option(wanted, place, self._judge)
            if option is None or option.step > Step.EVICT_IDLE or not self._cheap(option.victims):
                continue
            after = max(left, self._with(option, instance, view))
            ready = ready_s(view, place.worker, tier_of(place.worker.models.get(instance.model)))
            margin = policy.margin if option.victims else policy.free_margin
            gain = before - after - margin - ready / policy.horizon_s * policy.margin
            found.append(Move(instance, option, after, gain))
        return found

    def _movable(self, instance: Instance) -> bool:
        reconciler, view = self._reconciler, instance.view
        return (
            instance.serves
            and view is not None
            and view.facts is not None
            and not view.removed
            and not view.spec.pin
            and instance.work.compute + instance.work.kv_bytes > 0
            and instance.resident.state_s >= self._policy.min_stay_s
            and not self._board.rising.get(instance.model)
            and len(self._board.serving[instance.model]) <= view.spec.replicas
            and reconciler.commandable(instance)
        )

    def _without(self, gpu: Gpu, instance: Instance) -> float:
        return gpu.without_work(instance.work, instance.resident.weights_bytes)

    def _with(self, option: Option, instance: Instance, view: ModelView) -> float:
        place = option.place
        share = 1.0 / len(self._board.serving[instance.model])
        work = work_of(view, cost_on(view, place.worker), None, share)
        # What is measured at the source goes along.
        work = work._replace(
            kv_bytes=max(work.kv_bytes, instance.work.kv_bytes), compute=work.compute or instance.work.compute
        )
        return option.pressure_with(work, self._board.fixed_bytes(view, place.worker))

    def _cheap(self, victims: Iterable[Instance]) -> bool:
        """Whether hardly anyone will miss those that must sleep for a move, nor have them back before it."""
        return all(
            self._chance(victim) < self._policy.doubtful and not self._reconciler.is_called_for_again(victim)
            for victim in victims
        )

    def _chance(self, instance: Instance) -> float:
        assert instance.view is not None
        idle_s = min(instance.view.traffic.last_arrival_s, instance.resident.idle_s)
        return chance_to_return(instance.view, idle_s, self._policy.horizon_s)

    def _start(self, move: Move) -> None:
        """Bring it up at the target, or make room for it there; the source serves until that one does."""
        instance, option = move.instance, move.option
        view, source = instance.view, instance.place.worker.id
        assert view is not None
        reason = f"moves from {source}: pressure {instance.place.pressure:.2f}, then {move.after:.2f} at most"
        self._reconciler.take(Wanted(instance.model, view, reason, moves_from=source), option)
        # Until the target serves nobody else is there.
        self._board.commanded.add((source, instance.model))
        for gpu in instance.place.gpus:
            gpu.lose(instance.work, instance.resident.weights_bytes)

    def make_kv_room(self) -> None:
        """Where busy models lack KV cache, have idle neighbours sleep that will hardly be missed."""
        policy, reconciler = self._policy, self._reconciler
        for gpu in self._board.gpus:
            if gpu.kv_wanted <= policy.kv_short * gpu.kv_space or gpu.kv_wanted <= 0:
                continue
            idle = [
                one
                for one in gpu.instances
                if reconciler.is_idle(one)
                and reconciler.may_doze(one)
                and not reconciler.is_called_for_again(one)
                and self._chance(one) < policy.doubtful
            ]
            idle.sort(key=self._judge.victim_rank)
            for instance in idle:
                if gpu.kv_wanted <= policy.kv_short * gpu.kv_space:
                    break
                reconciler.doze(instance, "its neighbours lack memory for KV cache")
