"""`python -m prism.bench.calibration`: the simulator against a real CPU worker. Fitted on probes, checked on
another workload: a Poisson trace of two models at once. Writes `docs/results/calibration.json`."""

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import httpx
import msgspec
import numpy as np

from prism.bench.calibration.command import calibrate
from prism.bench.calibration.probing import DEADLINE_S, Timed, generate
from prism.bench.results import Row, missed, row, table, write_results
from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.objectives import measure_alone, with_objectives
from prism.bench.simulation.profiles import read_profile, write_profile
from prism.bench.simulation.scenario import admission_policy
from prism.bench.simulation.simulation import Limits, Outcome, Simulation
from prism.bench.traces.synthetic import Synthetic, synthetic_trace
from prism.bench.traces.trace import Trace
from prism.cli.demo import DEFAULT_FOLDER
from prism.cli.system import SystemSettings, running_system
from prism.cli.tiny_models import make_tiny_models
from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.scheduling.cost import GpuProfile, ModelCost
from prism.scheduling.placement import LruPlacement
from prism.scheduling.profiles import FOLDER

MODELS = ("tiny-llama", "tiny-qwen3")
ELEMENT_BYTES = 4
POOL_GB = 0.15
WORKER_GB = 1.0
LOADS = (0.25, 0.5)
"""Of one core, in the simulator's own costs."""
SCALE = 3.0
PROMPTS, OUTPUTS = (16, 400), (8, 48)
CHECK_S = 60.0
WORKER = Limits(max_running=16, chunk_tokens=512, elastic=False, freezes=False)


def check_trace(costs: Sequence[ModelCost], load: float, seed: int) -> Trace:
    """A Poisson trace that keeps a core busy for `load` of its time."""
    prompt, output = sum(PROMPTS) / 2, sum(OUTPUTS) / 2
    mean_s = float(
        np.mean([cost.prefill_s(round(prompt)) + output * cost.decode_step_s(1, prompt) for cost in costs])
    )
    shape = Synthetic(
        rate=load / mean_s, duration_s=CHECK_S, alpha=1.0, prompt_tokens=PROMPTS, output_tokens=OUTPUTS
    )
    return synthetic_trace(MODELS, shape, seed)


async def replay(client: httpx.AsyncClient, trace: Trace, seed: int) -> list[Timed]:
    """The trace against the running system, each request sent when it is due."""
    random_ = random.Random(seed)
    began = time.perf_counter()

    async def one(index: int) -> Timed:
        await asyncio.sleep(max(0.0, began + trace.arrival_s[index] - time.perf_counter()))
        model = trace.models[trace.model[index]]
        return await generate(client, model, trace.prompt_tokens[index], trace.output_tokens[index], random_)

    return list(await asyncio.gather(*(one(index) for index in range(len(trace)))))


def simulated(trace: Trace, models: list[SimulatedModel], profile: GpuProfile, admission: str) -> Outcome:
    """The same in the simulator."""
    return Simulation(
        trace,
        models,
        gpus=1,
        gpu_memory_bytes=round(WORKER_GB * 1e9),
        profile=profile,
        placement=LruPlacement(),
        admission=admission_policy(admission),
        limits=WORKER,
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


async def validate(folder: Path, admission: str) -> tuple[list[Row], GpuProfile, dict[str, ModelCost]]:
    """Calibrate and check on one system, in one go: the machine may be another one tomorrow."""
    make_tiny_models(folder, report=lambda line: None)
    specs = [
        ModelSpec(
            name,
            str(folder / name),
            init_placements=[InitialPlacement([0], on=True, max_memory_pool_size=POOL_GB)],
        )
        for name in MODELS
    ]
    base = msgspec.structs.replace(read_profile("h200"), memory_bytes=round(WORKER_GB * 1e9), context_bytes=0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="prism-calibration-") as temporary:
        placement = Path(temporary) / "placement.json"
        placement.write_bytes(msgspec.json.encode(specs))
        settings = SystemSettings(
            placement=placement,
            worker_memory_gb=WORKER_GB,
            image_dir=Path(temporary) / "images",
            environment={"PRISM_ADMISSION": admission},
        )
        log = Path(temporary) / "services.log"
        with log.open("w") as lines:
            async with running_system(settings, lambda name, line: print(name, line, file=lines)) as system:
                profile, costs = await calibrate(
                    system.gateway_url,
                    specs,
                    base,
                    name="cpu",
                    element_bytes=ELEMENT_BYTES,
                    tell=lambda line: click.echo(line, err=True),
                )
                models = [
                    SimulatedModel(
                        index,
                        spec,
                        msgspec.structs.replace(
                            read_model_facts(spec.model_name, spec.model_path), checkpoint_dtype="float32"
                        ),
                        costs[spec.model_name],
                        max_new_tokens=OUTPUTS[1],
                    )
                    for index, spec in enumerate(specs)
                ]
                async with httpx.AsyncClient(
                    base_url=system.gateway_url,
                    timeout=DEADLINE_S,
                    limits=httpx.Limits(max_connections=None),
                ) as client:
                    for load in LOADS:
                        click.echo(f"checking at a load of {load:g}", err=True)
                        trace = check_trace(list(costs.values()), load, seed=11)
                        seen = await replay(client, trace, seed=12)
                        alone = [
                            measure_alone(trace, model, profile, round(WORKER_GB * 1e9)) for model in models
                        ]
                        promised = with_objectives(models, alone, SCALE, SCALE)
                        outcome = simulated(trace, promised, profile, admission)
                        rows += compared(f"load_{round(100 * load)}", seen, outcome, promised)
    return rows, profile, costs


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path())
@click.option("--models", "folder", type=click.Path(path_type=Path), default=DEFAULT_FOLDER)
@click.option("--admission", default="first_come", show_default=True)
@click.option("--keep-profile", is_flag=True, help="Have the fitted profile come with Prism as `cpu`.")
def main(root: Path, folder: Path, admission: str, keep_profile: bool) -> None:
    """Fit the simulator to this machine's CPU worker, and check it on another workload."""
    rows, profile, costs = asyncio.run(validate(folder, admission))
    # A missed target says why, and that is the usual reason here.
    busy = os.getloadavg()[1]
    cores = len(os.sched_getaffinity(0))
    if busy > cores + 1:
        said = f"; load average {busy:.1f} on {cores} cores: others used the machine meanwhile"
        rows = [replace(each, note=each.note + said) for each in rows]
    if keep_profile:
        write_profile(profile, FOLDER / "cpu.json", costs)
    path = write_results(
        "calibration",
        rows,
        command="make bench-calibration",
        root=root.resolve(),
        packages=("sglang", "torch", "numpy"),
        details={
            "profile": msgspec.to_builtins(profile),
            "models": msgspec.to_builtins(costs),
            "admission": admission,
            "objectives": f"{SCALE:g} times what each model reaches alone",
        },
    )
    click.echo(table(rows))
    click.echo(f"{path}: {len(missed(rows))} targets missed")


if __name__ == "__main__":
    main()
