"""Why a model is where it is: the functions that plan, asked about one model, with their answers in words."""

import math

import msgspec

from prism.common.messages.explain import ExplainedPlace, ModelExplanation
from prism.common.messages.models import ModelState
from prism.scheduling.placement.actions import Action, Activate
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.gpus import Gpu, Place
from prism.scheduling.placement.judging import Judge, Step, has_judge
from prism.scheduling.placement.policy import PlacementPolicy
from prism.scheduling.placement.pricing import chance_to_return, ready_s, tier_of
from prism.scheduling.placement.prospects import Manners
from prism.scheduling.placement.reconcile import Reconciler
from prism.scheduling.placement.snapshot import ClusterSnapshot, Demand, ModelView
from prism.scheduling.placement.wants import NO_DEMAND, Wanted

HORIZON_S = 30.0

_STEPS = {
    Step.FREE: "memory is free",
    Step.AWAIT_IDLE: "memory comes free when idle models have gone to sleep",
    Step.EVICT_IDLE: "idle models would have to sleep",
    Step.AWAIT_BUSY: "memory comes free when requests have finished",
    Step.EVICT_BUSY: "busy models would have to sleep",
    Step.AWAIT_RIPE: "busy models would have to sleep, once they have been active for long enough",
}


def explain(
    policy: PlacementPolicy, snapshot: ClusterSnapshot, now: float, model: str, board: Board | None = None
) -> ModelExplanation | None:
    """An explanation of `model`, None for one that isn't known. With a `board`, which several may share,
    it is brief: without the plan and the places."""
    brief = board is not None
    view = snapshot.models.get(model)
    if view is None:
        return None
    demand, traffic = snapshot.demand.get(model, NO_DEMAND), view.traffic
    actions: list[Action] = []
    notes: list[str] = []
    if board is None:
        plan = policy.plan(snapshot, now)
        snapshot = policy.foresees(snapshot) if has_judge(policy) else snapshot
        view = snapshot.models[model]
        board = Board(snapshot, now)
        board.measure()
        actions = [action for action in plan.actions if action.model == model]
        notes = [note.text for note in plan.notes if note.model == model]
    return ModelExplanation(
        model=model,
        summary=_summary(board, view),
        parked=demand.parked,
        oldest_parked_s=round(demand.oldest_parked_s, 3),
        arrivals_per_s=round(traffic.arrivals_per_s, 4),
        prompt_tokens_per_s=round(traffic.prompt_tokens_per_s, 2),
        output_tokens_per_s=round(traffic.output_tokens_per_s, 2),
        last_arrival_s=round(traffic.last_arrival_s, 3) if math.isfinite(traffic.last_arrival_s) else None,
        chance_to_return=round(chance_to_return(view, traffic.last_arrival_s, HORIZON_S), 3),
        next=[_action_told(action) for action in actions],
        notes=notes,
        places=[] if brief or view.facts is None else _places(policy, snapshot, board, view, actions),
    )


def _summary(board: Board, view: ModelView) -> str:
    name = view.spec.model_name
    if view.removed:
        return "not registered any more"
    serving = sorted(one.place.worker.id for one in board.serving.get(name, ()))
    rising = sorted(one.place.worker.id for one in board.rising.get(name, ()))
    asleep = sorted(f"{one.place.worker.id} ({one.resident.state})" for one in board.asleep.get(name, ()))
    told = [f"active on {', '.join(serving)}"] if serving else []
    told += [f"coming up on {', '.join(rising)}"] if rising else []
    told += [f"asleep on {', '.join(asleep)}"] if asleep else []
    failed = sorted(
        place.worker.id
        for place in board.places.values()
        if name in place.worker.models and place.worker.models[name].state is ModelState.FAILED
    )
    told += [f"failed on {', '.join(failed)}"] if failed else []
    return "; ".join(told) or "on no GPU"


def _action_told(action: Action) -> str:
    kind = type(action).__name__.lower()
    return f"{kind} on {action.worker}: {action.reason}"


def _places(
    policy: PlacementPolicy,
    snapshot: ClusterSnapshot,
    board: Board,
    view: ModelView,
    actions: list[Action],
) -> list[ExplainedPlace]:
    """All places of a small cluster, near ones of a large one, best first."""
    manners = policy.manners if has_judge(policy) else Manners(0.0, 0.0, 0.0, 0.5)
    reconciler = Reconciler(snapshot, board, manners)
    judge: Judge | None = policy.judge(reconciler) if has_judge(policy) else None
    demand = snapshot.demand.get(view.spec.model_name, NO_DEMAND)
    wanted = Wanted(view.spec.model_name, view, "asked for", demand)
    chosen = {(action.worker, action.gpu_ids) for action in actions if isinstance(action, Activate)}
    rank = judge.gpu_rank if judge is not None else _pressure
    told = [
        _place(reconciler, judge, wanted, place, chosen)
        for place in board.places_for(view, rank, lambda place: True)
    ]
    order = {"here": 0, "coming": 1, "chosen": 2, "rejected": 3}
    told.sort(key=lambda one: (order[one.verdict], one.seconds is None, one.seconds or 0.0, one.worker))
    return told


def _pressure(gpu: Gpu) -> float:
    return gpu.pressure


def _place(
    reconciler: Reconciler,
    judge: Judge | None,
    wanted: Wanted,
    place: Place,
    chosen: set[tuple[str, tuple[int, ...]]],
) -> ExplainedPlace:
    board, worker, view, name = reconciler.board, place.worker, wanted.view, wanted.name
    here = board.instances.get((worker.id, name))
    is_here = here is not None and set(here.place.gpus) == set(place.gpus)
    need = board.need(view, worker)
    free = min(gpu.free - gpu.claimed for gpu in place.gpus)
    pressure = place.pressure
    work = reconciler.expected_work(view, place, replaces=not is_here)
    fixed = board.fixed_bytes(view, worker)
    with_it = pressure
    seconds: float | None = None
    sleeps: list[str] = []
    verdict, why = "rejected", ""
    if here is not None and is_here and here.serves:
        verdict, why = "here", "it serves here"
    elif is_here and any(one is here for one in board.rising.get(name, ())):
        verdict, why = "coming", "it is on its way up here"
    else:
        with_it = max(gpu.with_work(work, fixed) for gpu in place.gpus)
        option = reconciler.option(wanted, place, judge) if judge is not None else None
        patience_s: float | None = None
        if option is None and judge is not None:
            # As for a request that nobody waits longer than, and that has waited for long enough.
            asked = Demand(max(1, wanted.demand.parked), math.inf, math.inf)
            urgent = msgspec.structs.replace(wanted, demand=asked)
            option = reconciler.option(urgent, place, judge)
            patience_s = reconciler.patience_s(urgent, place, board.need_at(view, place))
        if (failure := board.backing_off.get((worker.id, name))) is not None:
            why = f"it failed here {failure.count} in a row: {failure.reason}"
        elif (worker.id, name) in board.commanded:
            why = "a command for it is in flight here"
        elif not board.could_ever_fit(view, place):
            why = f"too large: it takes {need / 1e9:.3f} GB, the GPU has {worker.limit_bytes / 1e9:.3f} GB"
        elif reconciler.is_bound_elsewhere(place, name):
            why = "its engine on this worker is bound to other GPUs"
        elif option is not None and judge is not None:
            sleeps = [victim.model for victim in option.victims]
            seconds = round(judge.seconds(wanted, option), 3) if hasattr(judge, "seconds") else None
            why = _STEPS[option.step]
            if patience_s is not None:
                why += f", once a request has waited for {patience_s:.3g} s"
            if patience_s is None and (refusal := judge.refuses(wanted, option)) is not None:
                why += f"; it {refusal}"
        else:
            why = (
                f"{need / 1e9:.3f} GB needed, {max(0, free) / 1e9:.3f} GB free" if need > free else "possible"
            )
        if (worker.id, place.gpu_ids) in chosen:
            verdict = "chosen"
        elif board.serving.get(name) and not why.startswith(("it failed", "too large", "a command")):
            source = max(one.place.pressure for one in board.serving[name])
            why += f"; it serves elsewhere, under {source:.2f} of pressure, here it would be {with_it:.2f}"
    return ExplainedPlace(
        worker=worker.id,
        gpu_ids=[gpu.id for gpu in place.gpus],
        verdict=verdict,
        why=why,
        pressure=_finite(pressure),
        pressure_with=_finite(with_it),
        seconds=seconds,
        ready_s=round(ready_s(view, worker, tier_of(worker.models.get(name))), 3),
        free_bytes=max(0, free),
        need_bytes=need,
        sleeps=sleeps,
    )


def _finite(pressure: float) -> float:
    return round(min(pressure, 1000.0), 3)
