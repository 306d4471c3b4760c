"""`prism simulate`: a trace against the real schedulers, on GPUs that are only computed."""

import json
import time
from typing import Any

import click

from prism.bench.simulation.initial_placement import searched_placements
from prism.bench.simulation.options import (
    Asked,
    clean_end,
    initial_placement_option,
    read_scenario,
    scenario_options,
    warn,
)
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import simulate, within
from prism.cli.table import aligned
from prism.scheduling import placement as placement_policies

DEFAULT_PLACEMENT = placement_policies.DEFAULT_POLICY


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The report for people."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def milliseconds(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f} ms" if value < 10_000 else f"{value / 1e3:,.1f} s"

    def cells(name: str, each: dict[str, Any]) -> tuple[str, ...]:
        return (
            name,
            str(each["requests"]),
            percent(each["both_attainment"]),
            percent(each["ttft_attainment"]),
            percent(each["tpot_attainment"]),
            milliseconds(each["p50_ttft_ms"]),
            milliseconds(each["p99_ttft_ms"]),
            milliseconds(each["p50_tpot_ms"]),
            milliseconds(each["p99_tpot_ms"]),
            str(each["activations"]),
            str(each["migrations"]),
            f"{each['gpu_seconds']:,.0f}",
        )

    header: tuple[str, ...] = (
        "model",
        "requests",
        "both",
        "ttft",
        "tpot",
        "ttft p50",
        "p99",
        "tpot p50",
        "p99",
    )
    header += ("activations", "migrations", "gpu s")
    rows = [cells(name, each) for name, each in result["models"].items()]
    lines = aligned(header, [*rows, cells("all", result)], right=range(1, len(header)))
    lines.append("")
    lines.append(
        f"{result['policy']} with {result['admission']} on {result['gpus']} GPUs: "
        f"{percent(result['both_attainment'])} of {result['requests']} requests met both objectives, "
        f"{result['goodput_rps']:.2f} a second; {result['requests'] - result['completed']} were not served"
    )
    lines += [f"note: {name}: {each['note']}" for name, each in result["models"].items() if "note" in each]
    return lines


@click.command("simulate")
@scenario_options
@click.option("--gpus", type=click.IntRange(min=1), required=True, help="How many GPUs.")
@click.option(
    "--policy",
    default=DEFAULT_PLACEMENT,
    show_default=True,
    help=f"Who is where: {', '.join(sorted(placement_policies.policies))}.",
)
@initial_placement_option("file")
def simulate_command(asked: Asked, gpus: int, policy: str, initial_placement: str) -> None:
    """Simulate a trace on GPUs with the real schedulers, and say how many requests met their objectives."""
    with clean_end():
        began = time.perf_counter()
        scenario = read_scenario(asked)
        settings: dict[str, Any] = {"gpus": gpus, "policy": policy, **asked.settings}
        _, warnings = within([model.spec for model in scenario.models], gpus)
        placements = None
        if initial_placement == "search":
            placements, warnings = searched_placements(scenario, seed=asked.seed, **settings), []
        warn(warnings)
        outcome = simulate(scenario, placements=placements, **settings)
        result = {
            **settings,
            "gpu_memory_gb": scenario.gpu_memory_bytes / 1e9,
            "profile": scenario.profile.name,
            "initial_placement": initial_placement,
            "seed": asked.seed,
            **report(outcome),
            "warnings": warnings,
        }
        if asked.as_json:
            click.echo(json.dumps(result))
            return
        took = time.perf_counter() - began
        lines = [*summary_lines(result), f"simulated in {took:.1f} s"]
        click.echo("\n".join(lines))
