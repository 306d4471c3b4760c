"""From what was measured of a model to its cost, and from several models' costs to a profile of the
device."""

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec
import numpy as np

from prism.bench.calibration.probing import Beside, Probe
from prism.common.messages.models import ModelFacts
from prism.scheduling.cost import OPERATIONS_PER_PARAMETER, GpuProfile, ModelCost, model_cost

LEAST_TOKEN_S = 1e-9


def fitted_cost(probe: Probe, facts: ModelFacts, base: GpuProfile, element_bytes: int | None) -> ModelCost:
    """The cost of the model that `probe` is of; what it does not tell (wakes, sizes) is as on `base`.

    A first token takes request_s + prefill_fixed_s + tokens * prefill_token_s. A burst of prompts takes
    prefill_fixed_s once for each of its passes, which tells the way to the engine and back from the prefill.
    """
    lengths = sorted(probe.first_token_s)
    token_s, _ = np.polyfit(lengths, [probe.first_token_s[length] for length in lengths], 1)
    token_s = max(float(token_s), LEAST_TOKEN_S)
    intercept = median(seconds - token_s * length for length, seconds in probe.first_token_s.items())
    few, many = min(probe.burst_s), max(probe.burst_s)
    more_tokens = (many - few) * probe.burst_tokens
    more_passes = _passes(probe, many) - _passes(probe, few)
    more_s = probe.burst_s[many] - probe.burst_s[few] - token_s * more_tokens
    # Prompts of which one pass takes a whole burst tell nothing of that: all of it counts as prefill then.
    pass_s = more_s / more_passes if more_passes else intercept
    prefill_fixed_s = min(max(0.0, pass_s), max(0.0, intercept))
    fixed, sequence, kv = nonnegative_fit(
        [(1.0, float(batch), held) for batch, held, _ in probe.steps], [step for _, _, step in probe.steps]
    )
    return msgspec.structs.replace(
        model_cost(facts, base, element_bytes=element_bytes),
        prefill_fixed_s=prefill_fixed_s,
        prefill_token_s=token_s,
        decode_fixed_s=max(fixed, LEAST_TOKEN_S),
        decode_sequence_s=sequence,
        decode_kv_token_s=kv,
        request_s=max(0.0, intercept - prefill_fixed_s),
    )


def _passes(probe: Probe, prompts: int) -> int:
    """How many passes a burst of so many takes: each is filled, the last prompt in it cut if need be."""
    return -(-prompts * probe.burst_tokens // probe.pass_tokens)


def nonnegative_fit(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Least squares with coefficients of 0 or more: the most negative one is left out until none is."""
    matrix, target = np.array(rows), np.array(targets)
    kept = list(range(matrix.shape[1]))
    while kept:
        found = np.linalg.lstsq(matrix[:, kept], target, rcond=None)[0]
        if found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    coefficients = [0.0] * matrix.shape[1]
    if kept:
        for place, value in zip(kept, found, strict=True):
            coefficients[place] = float(value)
    return coefficients


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
    slowdown: float,
    prefill_slowdown: float,
    name: str,
) -> GpuProfile:
    """A profile of the device: what models of other sizes would reach there, by the median of those
    measured. `slowdown` is how many times longer steps take when all of them compute, `prefill_slowdown` how
    many times longer prefills do."""
    together = len(costs)
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
        context_bytes=0,
        parallel_engines=max(1.0, together / max(1.0, slowdown)),
        prefill_parallel_engines=max(1.0, together / max(1.0, prefill_slowdown)),
        source=f"prism calibrate: {', '.join(costs)}; {together} at once take {slowdown:.2f} times as long, "
        f"a prefill among them {prefill_slowdown:.2f} times; not measured, as in {base.name}: "
        "wakes, dozes, bus and disk",
    )
