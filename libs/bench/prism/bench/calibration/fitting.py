"""From what was measured of a model to its cost, and from several models' costs to a profile of the
device."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median

import msgspec
import numpy as np

from prism.bench.calibration.probing import Beside, Probe
from prism.common.messages.models import ModelFacts
from prism.scheduling.cost import OPERATIONS_PER_PARAMETER, GpuProfile, ModelCost, model_cost

LEAST_TOKEN_S = 1e-9


def fitted_cost(probe: Probe, facts: ModelFacts, base: GpuProfile, element_bytes: int | None) -> ModelCost:
    """The cost of the model that `probe` is of; what it does not tell (wakes, sizes) is as on `base`.

    A burst of prompts takes request_s once, prefill_fixed_s for each of its passes and prefill_token_s for
    each token; one prompt is a burst of one. By least squares of the errors relative to what was measured:
    a slow machine takes longer for all in proportion.
    """
    bursts = [(1, length, seconds) for length, seconds in probe.first_token_s.items()]
    bursts += [(count, probe.burst_tokens, seconds) for count, seconds in probe.burst_s.items()]
    request_s, prefill_fixed_s, token_s = nonnegative_fit(
        [
            (1.0 / seconds, _passes(probe, count) / seconds, count * length / seconds)
            for count, length, seconds in bursts
        ],
        [1.0] * len(bursts),
    )
    if max(_passes(probe, count) for count in probe.burst_s) == 1:
        # No burst takes two passes, and none tells the two apart.
        request_s, prefill_fixed_s = 0.0, request_s + prefill_fixed_s
    fixed, sequence, kv = nonnegative_fit(
        [(1.0, float(batch), held) for batch, held, _ in probe.steps], [step for _, _, step in probe.steps]
    )
    return msgspec.structs.replace(
        model_cost(facts, base, element_bytes=element_bytes),
        prefill_fixed_s=prefill_fixed_s,
        prefill_token_s=max(token_s, LEAST_TOKEN_S),
        decode_fixed_s=max(fixed, LEAST_TOKEN_S),
        decode_sequence_s=sequence,
        decode_kv_token_s=kv,
        request_s=request_s,
    )


def _passes(probe: Probe, prompts: int) -> int:
    """How many passes a burst of so many takes: each is filled, the last prompt in it cut if need be."""
    return -(-prompts * probe.burst_tokens // probe.pass_tokens)


def nonnegative_fit(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Least squares with coefficients of 0 or more. There are few: the best of all choices of those that are
    not 0, since the optimum is one of these."""
    matrix, target = np.array(rows), np.array(targets)
    columns = range(matrix.shape[1])
    best, least = [0.0 for _ in columns], float(target @ target)
    for count in range(1, len(columns) + 1):
        for kept in combinations(columns, count):
            chosen = matrix[:, kept]
            found = np.linalg.lstsq(chosen, target, rcond=None)[0]
            error = target - chosen @ found
            if found.min() >= 0 and float(error @ error) < least:
                least = float(error @ error)
                best = [float(found[kept.index(place)]) if place in kept else 0.0 for place in columns]
    return best


def prefill_slowdown(seen: Sequence[Beside], costs: Mapping[str, ModelCost]) -> float:
    """How many times longer a prefill takes while all other models decode, by the median of them. What a
    first token takes longer there is its prefill's: the way to the engine keeps no GPU busy."""
    return median(
        1.0 + (each.beside_s - each.alone_s) / costs[each.model].prefill_s(each.prompt_tokens)
        for each in seen
    )


def fitted_profile(
    costs: Mapping[str, ModelCost],
    facts: Mapping[str, ModelFacts],
    base: GpuProfile,
    *,
    slowdown: float | None,
    prefill_slowdown: float | None,
    name: str,
) -> GpuProfile:
    """A profile of the device: what models of other sizes would reach there, by the median of those
    measured. `slowdown` is how many times longer steps take when all of them compute, `prefill_slowdown` how
    many times longer prefills do; None where that was not measured, which is as on `base` then."""
    together = len(costs)
    told, unknown = "", "contexts, wakes, dozes, bus and disk"
    parallel, prefill_parallel = base.parallel_engines, base.prefill_parallel_engines
    if slowdown is None or prefill_slowdown is None:
        unknown = f"{together} at once, {unknown}"
    else:
        parallel = max(1.0, together / max(1.0, slowdown))
        prefill_parallel = max(1.0, together / max(1.0, prefill_slowdown))
        told = (
            f"{together} at once take {slowdown:.2f} times as long, a prefill among them "
            f"{prefill_slowdown:.2f} times; "
        )
    return msgspec.structs.replace(
        base,
        name=name,
        operations_per_s=median(
            OPERATIONS_PER_PARAMETER * facts[model].parameters / cost.prefill_token_s
            for model, cost in costs.items()
        ),
        memory_bytes_per_s=median(cost.weights_bytes / cost.decode_fixed_s for cost in costs.values()),
        prefill_fixed_s=median(cost.prefill_fixed_s for cost in costs.values()),
        prefill_bytes_per_s=1e18,
        decode_fixed_s=0.0,
        decode_sequence_s=median(cost.decode_sequence_s for cost in costs.values()),
        request_s=median(cost.request_s for cost in costs.values()),
        parallel_engines=parallel,
        prefill_parallel_engines=prefill_parallel,
        source=f"prism calibrate: {', '.join(costs)}; {told}not measured, as in {base.name}: {unknown}",
    )
