"""From files to a simulation: the placement file's models, their costs, a trace mapped onto them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.objectives import Alone, measure_alone, with_objectives
from prism.bench.simulation.simulation import Limits, Outcome, Simulation
from prism.bench.traces.trace import Trace, mapped, scaled
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.common.placement_file import read_placement_file
from prism.scheduling import admission as admission_policies
from prism.scheduling import placement as placement_policies
from prism.scheduling.cost import GpuProfile, ModelCost, model_cost

FIXED_QUOTAS = frozenset({"static"})
"""Policies whose models keep the memory that they were given."""


class Scenario(msgspec.Struct):
    """Models and a trace of theirs on one kind of GPU, at the trace's own rate; what each model reaches
    alone."""

    trace: Trace
    models: list[SimulatedModel]
    profile: GpuProfile
    gpu_memory_bytes: int
    alone: list[Alone]


def read_models(
    path: Path,
    profile: GpuProfile,
    context_length: int | None = None,
    measured: Mapping[str, ModelCost] | None = None,
) -> list[SimulatedModel]:
    """The models of a placement file with what they cost on such a GPU, serving contexts of at most
    `context_length` tokens; what was `measured` of a model, by name, goes before that.

    Raises PrismError(invalid_request).
    """
    specs = read_placement_file(path)
    if not specs:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"placement file {path} has no models")
    facts = [
        read_model_facts(spec.model_name, spec.model_path, tokens_of_context=context_length) for spec in specs
    ]
    return [
        SimulatedModel(
            index,
            spec,
            found,
            (measured or {}).get(spec.model_name) or model_cost(found, profile, tp_size=spec.tp_size),
        )
        for index, (spec, found) in enumerate(zip(specs, facts, strict=True))
    ]


def make_scenario(
    trace: Trace,
    models: Sequence[SimulatedModel],
    profile: GpuProfile,
    gpu_memory_bytes: int,
    mapping: Mapping[str, str] | None = None,
) -> Scenario:
    """Map `trace` onto `models` and find out what each reaches alone."""
    own = mapped(trace, [model.name for model in models], mapping)
    longest = [1] * len(models)
    for model, output in zip(own.model, own.output_tokens, strict=True):
        longest[model] = max(longest[model], output)
    models = [msgspec.structs.replace(model, max_new_tokens=longest[model.index]) for model in models]
    alone = [measure_alone(own, model, profile, gpu_memory_bytes) for model in models]
    return Scenario(own, models, profile, gpu_memory_bytes, alone)


def within(specs: Sequence[ModelSpec], gpus: int) -> tuple[list[ModelSpec], list[str]]:
    """The specs with their GPU ids taken modulo `gpus`, and a warning for each that had others.

    A placement that then names a GPU twice (a tensor-parallel group wider than the cluster) is left out.
    """
    found, warnings = [], []
    for spec in specs:
        placements = []
        for placement in spec.init_placements:
            ids = [gpu % gpus for gpu in placement.gpu_ids]
            if ids != placement.gpu_ids:
                warnings.append(
                    f"{spec.model_name}: gpu_ids {placement.gpu_ids} taken modulo {gpus} GPUs: {ids}"
                )
            if len(set(ids)) == len(ids):
                placements.append(InitialPlacement(ids, placement.on, placement.max_memory_pool_size))
            else:
                warnings.append(f"{spec.model_name}: {len(ids)} different GPUs are needed, there are {gpus}")
        found.append(msgspec.structs.replace(spec, init_placements=placements))
    return found, warnings


def placement_policy(name: str) -> placement_policies.PlacementPolicy:
    """The placement policy of that name. Raises PrismError(invalid_request)."""
    policy: placement_policies.PlacementPolicy = _named(
        placement_policies.policies, name, "placement policy"
    )()
    return policy


def admission_policy(name: str) -> admission_policies.AdmissionPolicy:
    """The admission policy of that name. Raises PrismError(invalid_request)."""
    policy: admission_policies.AdmissionPolicy = _named(
        admission_policies.policies, name, "admission policy"
    )()
    return policy


def _named(known: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise PrismError(
            ErrorCode.INVALID_REQUEST, f"{what} {name!r} is not known; known: {', '.join(sorted(known))}"
        )
    return known[name]


def simulate(
    scenario: Scenario,
    *,
    gpus: int,
    policy: str,
    admission: str = "first_come",
    ttft_scale: float = 5.0,
    tpot_scale: float = 5.0,
    rate_scale: float = 1.0,
    limits: Limits | None = None,
    placements: Sequence[ModelSpec] | None = None,
) -> Outcome:
    """One run; quotas move unless the policy is one of FIXED_QUOTAS. `placements` are specs to be used
    instead of the scenario's own, in the same order."""
    limits = limits or Limits(elastic=policy not in FIXED_QUOTAS)
    if gpus < 1:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"{gpus} GPUs: at least 1 is needed")
    specs, _ = within(placements or [model.spec for model in scenario.models], gpus)
    models = [
        msgspec.structs.replace(model, spec=spec) for model, spec in zip(scenario.models, specs, strict=True)
    ]
    return Simulation(
        scaled(scenario.trace, rate_scale),
        with_objectives(models, scenario.alone, ttft_scale, tpot_scale),
        gpus=gpus,
        gpu_memory_bytes=scenario.gpu_memory_bytes,
        profile=scenario.profile,
        placement=placement_policy(policy),
        admission=admission_policy(admission),
        limits=limits,
    ).run()
