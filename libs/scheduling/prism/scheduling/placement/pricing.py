"""What a model costs on a worker's GPUs, and how soon it will probably be asked for again."""

import math
from typing import NamedTuple

from prism.common.messages.models import ModelFacts, ModelSpec, ModelState, Tier
from prism.scheduling.cost import GpuProfile, ModelCost, model_cost
from prism.scheduling.memory import kv_floor, kv_reservation, weights_bytes
from prism.scheduling.placement.snapshot import ModelView, ResidentModel, WorkerView

UNKNOWN_GAP_S = 60.0
UNKNOWN_READY_S = {
    Tier.ACTIVE: 0.0,
    Tier.DOZING: 0.5,
    Tier.FROZEN: 1.0,
    Tier.STAGED: 2.0,
    Tier.COLD: 5.0,
}
"""Seconds until a model serves, where nobody knows what the GPU can do: only their order matters."""

TIERS = {
    ModelState.ACTIVE: Tier.ACTIVE,
    ModelState.DOZING: Tier.DOZING,
    ModelState.FROZEN: Tier.FROZEN,
    ModelState.STAGED: Tier.STAGED,
}

_REMEMBERED = 100_000
_costs: dict[tuple[int, int, int | None, int], tuple[ModelFacts, GpuProfile, ModelCost]] = {}
_sizes: dict[tuple[int, int, int | None], tuple[ModelSpec, ModelFacts, "Sizes"]] = {}


class Sizes(NamedTuple):
    """Bytes of an instance on each of its GPUs: weights, the least KV cache, and what it is given at best."""

    weights: int
    kv_floor: int
    kv_reservation: int


def sizes_on(view: ModelView, worker: WorkerView) -> Sizes:
    """What a model with facts takes on a worker's GPUs; remembered as in `cost_on`."""
    spec, facts, element = view.spec, view.facts, worker.element_bytes
    assert facts is not None
    key = (id(spec), id(facts), element)
    known = _sizes.get(key)
    if known is not None and known[0] is spec and known[1] is facts:
        return known[2]
    sizes = Sizes(
        weights_bytes(facts, element, spec.tp_size),
        kv_floor(spec, facts, element),
        kv_reservation(spec, facts, element),
    )
    if len(_sizes) >= _REMEMBERED:
        _sizes.clear()
    _sizes[key] = (spec, facts, sizes)
    return sizes


def cost_on(view: ModelView, worker: WorkerView) -> ModelCost | None:
    """The model's cost on a worker's GPUs; None without facts or a profile.

    A pure function, remembered by the identity of what it is computed from: plans ask again and again.
    """
    facts, profile = view.facts, worker.profile
    if facts is None or profile is None:
        return None
    key = (id(facts), id(profile), worker.element_bytes, view.spec.tp_size)
    known = _costs.get(key)
    if known is not None and known[0] is facts and known[1] is profile:
        return known[2]
    cost = model_cost(facts, profile, element_bytes=worker.element_bytes, tp_size=view.spec.tp_size)
    if len(_costs) >= _REMEMBERED:
        _costs.clear()
    _costs[key] = (facts, profile, cost)
    return cost


def ready_s(view: ModelView, worker: WorkerView, tier: Tier) -> float:
    """Seconds from the command to serving there, for a model that is in `tier`."""
    cost = cost_on(view, worker)
    return cost.ready_s(tier) if cost is not None else UNKNOWN_READY_S[tier]


def tier_of(resident: ResidentModel | None) -> Tier:
    """How near to serving a model is on a worker; cold where it is not known or between tiers."""
    return TIERS.get(resident.state, Tier.COLD) if resident is not None else Tier.COLD


def chance_to_return(view: ModelView, idle_s: float, horizon_s: float) -> float:
    """How probably a model that has been idle for `idle_s` is asked for within `horizon_s` seconds.

    Gaps between a model's requests have a heavy tail: the longer it has been away, the longer it probably
    stays away. So they are taken as Lomax distributed with shape 1 and its usual gap as scale, for which the
    chance is horizon / (horizon + gap + idle).
    """
    traffic = view.traffic
    gap = traffic.gap_s
    if gap is None:
        gap = 1.0 / traffic.arrivals_per_s if traffic.arrivals_per_s > 1.0 / UNKNOWN_GAP_S else UNKNOWN_GAP_S
    if not math.isfinite(idle_s):
        return 0.0
    return horizon_s / (horizon_s + gap + max(0.0, idle_s))
