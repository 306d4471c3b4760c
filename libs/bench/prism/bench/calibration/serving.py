"""What a served workload tells beyond probes: how much longer first tokens and steps take in it.

Probes ask again at once. An engine that was idle, or is one of several at work, may take longer than that for
reasons that no cost model knows (a processor that had slowed down, caches that others have filled).
"""

from collections.abc import Mapping, Sequence
from math import isnan
from statistics import fmean

import msgspec

from prism.bench.calibration.probing import Timed
from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.simulation import Limits, Outcome, Simulation
from prism.bench.traces.synthetic import Synthetic, synthetic_trace
from prism.bench.traces.trace import Trace
from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec
from prism.scheduling.admission import FirstComeAdmission
from prism.scheduling.cost import GpuProfile, ModelCost
from prism.scheduling.memory import GB
from prism.scheduling.placement import LruPlacement

LOAD = 0.35
PROMPTS, OUTPUTS = (16, 1024), (8, 128)
LEAST_S = 1e-9
# What is added changes how requests wait for each other, which changes what is to be added, a little.
TIMES = 3
POOL_GB = 16.0


def poisson_trace(
    costs: Mapping[str, ModelCost],
    prompts: tuple[int, int],
    outputs: tuple[int, int],
    *,
    load: float,
    duration_s: float,
    seed: int,
) -> Trace:
    """Requests for all models of `costs` that keep the device busy for `load` of its time."""
    prompt, output = sum(prompts) / 2, sum(outputs) / 2
    alone = [
        cost.prefill_s(round(prompt)) + output * cost.decode_step_s(1, prompt) for cost in costs.values()
    ]
    shape = Synthetic(
        rate=load / fmean(alone),
        duration_s=duration_s,
        alpha=1.0,
        prompt_tokens=prompts,
        output_tokens=outputs,
    )
    return synthetic_trace(tuple(costs), shape, seed)


def serving_trace(
    costs: Mapping[str, ModelCost], context_length: int, pass_tokens: int, *, duration_s: float, seed: int
) -> Trace:
    """The workload that costs are fitted to. `context_length` is that of the model with the shortest."""
    prompts = (PROMPTS[0], max(PROMPTS[0], min(PROMPTS[1], context_length // 2, pass_tokens)))
    outputs = (OUTPUTS[0], max(OUTPUTS[0], min(OUTPUTS[1], context_length // 4)))
    return poisson_trace(costs, prompts, outputs, load=LOAD, duration_s=duration_s, seed=seed)


def served_outcome(
    trace: Trace,
    facts: Mapping[str, ModelFacts],
    costs: Mapping[str, ModelCost],
    profile: GpuProfile,
    pass_tokens: int,
) -> Outcome:
    """The trace in the simulator, on one GPU with memory for all of the models, which are active; a pass
    prefills `pass_tokens`."""
    placements = [InitialPlacement([0], on=True, max_memory_pool_size=POOL_GB)]
    models = [
        SimulatedModel(index, ModelSpec(name, name, init_placements=placements), facts[name], costs[name])
        for index, name in enumerate(trace.models)
    ]
    held = sum(cost.weights_bytes + cost.context_bytes + POOL_GB * GB for cost in costs.values())
    return Simulation(
        trace,
        models,
        gpus=1,
        gpu_memory_bytes=round(2 * held),
        profile=profile,
        placement=LruPlacement(),
        admission=FirstComeAdmission(),
        limits=Limits(chunk_tokens=pass_tokens, elastic=False, freezes=False),
    ).run()


def fitted_to_served(
    trace: Trace,
    seen: Sequence[Timed],
    facts: Mapping[str, ModelFacts],
    costs: Mapping[str, ModelCost],
    profile: GpuProfile,
    pass_tokens: int,
) -> dict[str, ModelCost]:
    """`costs` with as much added to each model's prefills and steps, or taken from them, as its requests took
    longer than simulated, by the mean without the tenth at either end."""
    found = dict(costs)
    for _ in range(TIMES):
        outcome = served_outcome(trace, facts, found, profile, pass_tokens)
        for index, model in enumerate(trace.models):
            first, step = [], []
            for request, timed in enumerate(seen):
                if trace.model[request] != index or isnan(outcome.ttft_s[request]):
                    continue
                first.append(timed.ttft_s - outcome.ttft_s[request])
                if timed.output_tokens > 1:
                    step.append(timed.tpot_s - outcome.tpot_s[request])
            cost = found[model]
            found[model] = msgspec.structs.replace(
                cost,
                prefill_fixed_s=max(0.0, cost.prefill_fixed_s + _trimmed_mean(first)),
                decode_fixed_s=max(LEAST_S, cost.decode_fixed_s + _trimmed_mean(step)),
            )
    return found


def _trimmed_mean(values: Sequence[float]) -> float:
    if not values:
        return 0.0
    cut = len(values) // 10
    return fmean(sorted(values)[cut : len(values) - cut])
