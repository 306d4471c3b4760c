"""How many GPUs it takes to keep a share of the promises: the least number, by policy."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from prism.bench.simulation.initial_placement import searched_placements
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import Scenario, simulate

Measure = Callable[[int], float]


class Needed(msgspec.Struct, frozen=True):
    """The least number of GPUs that reached the target, None when none up to the limit did, and the
    attainment at every number that was tried."""

    gpus: int | None
    tried: dict[int, float]


def least_gpus(measure: Measure, target: float, *, least: int, most: int) -> Needed:
    """Where `measure(gpus)` first reaches `target`: by doubling, then by halving what is between.

    More GPUs are taken to do no harm; the number returned did reach the target, and the one below it, if it
    was in question, did not.
    """
    tried: dict[int, float] = {}

    def reaches(gpus: int) -> bool:
        if gpus not in tried:
            tried[gpus] = measure(gpus)
        return tried[gpus] >= target

    low, high = least - 1, least
    while not reaches(high):
        if high >= most:
            return Needed(None, tried)
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return Needed(high, tried)


def attainment(
    scenario: Scenario, gpus: int, policy: str, *, which: str, search: bool, seed: int, **settings: Any
) -> float:
    """The attainment `which` of a run, from the best initial placement that a search finds, or the
    scenario's."""
    placements = None
    if search:
        placements = searched_placements(scenario, gpus=gpus, policy=policy, seed=seed, **settings)
    outcome = simulate(scenario, gpus=gpus, policy=policy, placements=placements, **settings)
    return float(report(outcome)[which] or 0.0)


def needed_by_policy(
    scenario: Scenario,
    policies: Sequence[str],
    target: float,
    *,
    most: int,
    which: str = "both_attainment",
    search: bool = True,
    seed: int = 0,
    on_run: Callable[[str, int, float], None] = lambda policy, gpus, reached: None,
    **settings: Any,
) -> dict[str, Needed]:
    """The least number of GPUs for each policy; `on_run` hears of each run."""
    least = max(model.spec.tp_size for model in scenario.models)
    found = {}
    for policy in policies:

        def measure(gpus: int, policy: str = policy) -> float:
            reached = attainment(scenario, gpus, policy, which=which, search=search, seed=seed, **settings)
            on_run(policy, gpus, reached)
            return reached

        found[policy] = least_gpus(measure, target, least=least, most=max(least, most))
    return found
