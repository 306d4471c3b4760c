"""The simulator against a real system: fitted on probes, checked on a Poisson trace of two models at once."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import httpx
import msgspec
import numpy as np

from prism.bench.calibration.probing import DEADLINE_S, Timed
from prism.bench.calibration.replaying import joined, parts_of, replay
from prism.bench.calibration.rounds import Rounds, served_contexts
from prism.bench.calibration.serving import poisson_trace
from prism.bench.calibration.setups import Setup
from prism.bench.results import Row, row
from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.objectives import measure_alone, with_objectives
from prism.bench.simulation.profiles import read_profile
from prism.bench.simulation.scenario import admission_policy
from prism.bench.simulation.simulation import Outcome, Simulation
from prism.bench.traces.trace import Trace
from prism.cli.system import SystemSettings, running_system
from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.scheduling.cost import GpuProfile, ModelCost
from prism.scheduling.placement import LruPlacement

SCALE = 3.0
TRACE_SEED, PROMPT_SEED = 11, 12
FIRST_ROUNDS = 2


def simulated(
    trace: Trace, models: list[SimulatedModel], profile: GpuProfile, admission: str, setup: Setup
) -> Outcome:
    """The same in the simulator."""
    return Simulation(
        trace,
        models,
        gpus=1,
        gpu_memory_bytes=round(setup.worker_gb * 1e9),
        profile=profile,
        placement=LruPlacement(),
        admission=admission_policy(admission),
        limits=setup.limits,
    ).run()


def compared(name: str, seen: list[Timed], outcome: Outcome, models: Sequence[SimulatedModel]) -> list[Row]:
    """How far the simulator is from what was measured."""
    trace = outcome.trace
    slo = [(models[m].ttft_slo_s, models[m].tpot_slo_s) for m in trace.model]
    real_ttft = np.array([each.ttft_s for each in seen])
    real_tpot = np.array([each.tpot_s if each.output_tokens > 1 else 0.0 for each in seen])
    ttft, tpot = np.array(outcome.ttft_s), np.array(outcome.tpot_s)
    ttft_slo, tpot_slo = np.array([a for a, _ in slo]), np.array([b for _, b in slo])
    real = float(np.mean((real_ttft <= ttft_slo) & (real_tpot <= tpot_slo)))
    said = float(np.mean((ttft <= ttft_slo) & (tpot <= tpot_slo)))
    ratio = float(ttft.mean() / real_ttft.mean())
    return [
        row(f"attainment_{name}_off_points", round(100 * abs(real - said), 2), "points", target=5.0,
            note=f"measured {real:.3f}, simulated {said:.3f} of {len(seen)} requests"),
        row(f"mean_ttft_{name}_off_ratio", round(abs(ratio - 1), 4), "ratio", target=0.2,
            note=f"measured {1e3 * real_ttft.mean():.1f} ms, simulated {1e3 * ttft.mean():.1f} ms"),
        row(f"mean_tpot_{name}_off_ratio", round(abs(tpot.mean() / real_tpot.mean() - 1), 4), "ratio",
            note=f"measured {1e3 * real_tpot.mean():.2f} ms, simulated {1e3 * tpot.mean():.2f} ms"),
        row(f"p95_ttft_{name}_off_ratio",
            round(abs(np.percentile(ttft, 95) / np.percentile(real_ttft, 95) - 1), 4), "ratio",
            note=f"measured {1e3 * np.percentile(real_ttft, 95):.1f} ms, "
            f"simulated {1e3 * np.percentile(ttft, 95):.1f} ms"),
    ]  # fmt: skip


class CheckedRequest(msgspec.Struct, frozen=True):
    """One request of a check: when it came, in seconds, its tokens, and both times to its first token."""

    load: float
    arrival_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
    measured_ttft_s: float
    simulated_ttft_s: float


class Checked(msgspec.Struct, frozen=True):
    """What a check found, and what it was found with."""

    rows: list[Row]
    profile: GpuProfile
    costs: dict[str, ModelCost]
    requests: list[CheckedRequest]


def checked_requests(load: float, seen: list[Timed], outcome: Outcome) -> list[CheckedRequest]:
    """Each request, to find out where the two part."""
    trace = outcome.trace
    return [
        CheckedRequest(
            load,
            round(trace.arrival_s[index], 3),
            trace.models[trace.model[index]],
            trace.prompt_tokens[index],
            trace.output_tokens[index],
            round(timed.ttft_s, 4),
            round(outcome.ttft_s[index], 4),
        )
        for index, timed in enumerate(seen)
    ]


async def check(setup: Setup, folder: Path, admission: str, log: Path) -> Checked:
    """Calibrate and check on one system, by turns: a machine may be a slower one for seconds or minutes, and
    both should meet it in all its states. `log` gets what the services say."""
    paths = await asyncio.to_thread(setup.models, folder)
    placements = [InitialPlacement([0], on=True, max_memory_pool_size=setup.pool_gb)]
    specs = [ModelSpec(name, str(path), init_placements=placements) for name, path in paths.items()]
    with tempfile.TemporaryDirectory(prefix="prism-calibration-") as temporary:
        placement = Path(temporary) / "placement.json"
        placement.write_bytes(msgspec.json.encode(specs))
        settings = SystemSettings(
            placement=placement,
            device=setup.device,
            worker_memory_gb=setup.worker_gb,
            image_dir=Path(temporary) / "images",
            environment={"PRISM_ADMISSION": admission},
        )
        with log.open("w", buffering=1) as lines:
            async with (
                running_system(settings, lambda name, line: print(name, line, file=lines)) as system,
                httpx.AsyncClient(
                    base_url=system.gateway_url,
                    timeout=DEADLINE_S,
                    limits=httpx.Limits(max_connections=None),
                ) as client,
            ):
                return await _checked(client, setup, specs, admission)


async def _checked(
    client: httpx.AsyncClient, setup: Setup, specs: Sequence[ModelSpec], admission: str
) -> Checked:
    def tell(line: str) -> None:
        click.echo(line, err=True)

    memory = round(setup.worker_gb * 1e9)
    base = msgspec.structs.replace(
        read_profile("h200"), memory_bytes=memory, context_bytes=setup.context_bytes
    )
    facts = {spec.model_name: read_model_facts(spec.model_name, spec.model_path) for spec in specs}
    contexts = await served_contexts(client, list(facts))
    rounds = Rounds(
        client,
        contexts,
        facts,
        base,
        pass_tokens=setup.limits.chunk_tokens,
        element_bytes=setup.element_bytes,
        tell=tell,
    )
    replayed: list[tuple[float, Trace, list[Timed]]] = []
    await rounds.measure(FIRST_ROUNDS)
    for load in setup.loads:
        tell(f"checking at a load of {load:g}")
        trace = poisson_trace(
            rounds.fitted(setup.device)[1],
            setup.prompts,
            setup.outputs,
            load=load,
            duration_s=setup.check_s,
            seed=TRACE_SEED,
        )
        parts = parts_of(trace, setup.parts, setup.check_s)
        seen: list[Timed] = []
        for number, part in enumerate(parts):
            # Each load has prompts of its own: the caches still hold those of the one before.
            seen += await replay(client, part, f"{PROMPT_SEED}/{load:g}/{number}")
            await rounds.measure(1)
            await rounds.serve(setup.fit_s / len(setup.loads) / len(parts))
        replayed.append((load, joined(parts), seen))
    profile, costs = rounds.fitted(setup.device)
    models = [
        SimulatedModel(
            index,
            spec,
            msgspec.structs.replace(facts[spec.model_name], checkpoint_dtype=setup.dtype),
            costs[spec.model_name],
            max_new_tokens=setup.outputs[1],
        )
        for index, spec in enumerate(specs)
    ]
    rows: list[Row] = []
    requests: list[CheckedRequest] = []
    for load, trace, seen in replayed:
        alone = [measure_alone(trace, model, profile, memory) for model in models]
        promised = with_objectives(models, alone, SCALE, SCALE)
        outcome = simulated(trace, promised, profile, admission, setup)
        rows += compared(f"load_{round(100 * load)}", seen, outcome, promised)
        requests += checked_requests(load, seen, outcome)
    return Checked(rows, profile, costs, requests)
