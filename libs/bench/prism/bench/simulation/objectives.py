"""What is promised of each model: a multiple of the 95th percentile that it reaches alone on such a GPU."""

from collections.abc import Sequence
from math import isnan

import msgspec
import numpy as np

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.simulation import Limits, Simulation
from prism.bench.traces.trace import Trace, only, trace_of
from prism.common.messages.models import InitialPlacement
from prism.scheduling.admission import FirstComeAdmission
from prism.scheduling.cost import GpuProfile
from prism.scheduling.memory import GB
from prism.scheduling.placement import LruPlacement

PERCENTILE = 95
AT_MOST = 2000
"""Requests of a model that the percentile is taken over: the first ones."""


class Alone(msgspec.Struct, frozen=True):
    """The 95th percentiles of a model that has its GPUs to itself, in seconds."""

    ttft_s: float
    tpot_s: float


def measure_alone(trace: Trace, model: SimulatedModel, profile: GpuProfile, gpu_memory_bytes: int) -> Alone:
    """Serve the model's part of `trace`, as it stands, on `tp_size` GPUs with nobody else on them."""
    own = only(trace, model.index)
    if not len(own):
        # Never asked for: what a prompt of usual length would take.
        cost = model.cost
        return Alone(cost.request_s + cost.prefill_s(256), cost.decode_step_s(1, 256))
    rows = [
        (own.arrival_s[i] - own.arrival_s[0], 0, own.prompt_tokens[i], own.output_tokens[i])
        for i in range(min(len(own), AT_MOST))
    ]
    memory = max(gpu_memory_bytes, round(1.5 * model.cost.weights_bytes) + model.cost.context_bytes)
    pool = memory - model.cost.weights_bytes - model.cost.context_bytes
    tp_size = model.spec.tp_size
    placement = InitialPlacement(list(range(tp_size)), True, pool / GB)
    spec = msgspec.structs.replace(model.spec, init_placements=[placement])
    alone = msgspec.structs.replace(model, index=0, spec=spec)
    outcome = Simulation(
        trace_of((model.name,), rows, sort=False),
        [alone],
        gpus=tp_size,
        gpu_memory_bytes=memory,
        profile=profile,
        placement=LruPlacement(),
        admission=FirstComeAdmission(),
        limits=Limits(gpus_per_worker=tp_size, plan_interval_s=60.0),
    ).run()
    return Alone(_percentile(outcome.ttft_s), _percentile(outcome.tpot_s))


def _percentile(values: Sequence[float]) -> float:
    served = [value for value in values if not isnan(value)]
    return float(np.percentile(served, PERCENTILE)) if served else float("inf")


def with_objectives(
    models: Sequence[SimulatedModel], alone: Sequence[Alone], ttft_scale: float, tpot_scale: float
) -> list[SimulatedModel]:
    """The models with objectives of so many times what they reach alone; their specs say the same."""
    found = []
    for model, reached in zip(models, alone, strict=True):
        ttft_s, tpot_s = reached.ttft_s * ttft_scale, reached.tpot_s * tpot_scale
        spec = msgspec.structs.replace(
            model.spec,
            ttft_slo_ms=min(3_600_000.0, max(1e-3, ttft_s * 1e3)),
            tpot_slo_ms=min(3_600_000.0, max(1e-3, tpot_s * 1e3)),
        )
        found.append(msgspec.structs.replace(model, spec=spec, ttft_slo_s=ttft_s, tpot_slo_s=tpot_s))
    return found
