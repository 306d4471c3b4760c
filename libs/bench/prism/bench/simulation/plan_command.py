"""`prism plan`: how many GPUs a load needs under each policy, and what sharing them saves."""

import json
from pathlib import Path
from typing import Any

import click

from prism.bench.simulation.capacity import Needed, needed_by_policy
from prism.bench.simulation.options import (
    Asked,
    clean_end,
    initial_placement_option,
    read_scenario,
    scenario_options,
)
from prism.bench.simulation.plots import plot_lines
from prism.cli.table import aligned
from prism.common.errors import ErrorCode, PrismError
from prism.scheduling import placement as placement_policies

BASELINE = "static"
HOURS_A_MONTH = 730


def savings(needed: dict[str, Needed], price: float | None) -> dict[str, dict[str, Any]]:
    """Of each policy: GPUs, the share of the baseline's GPUs that it saves, and with a `price` per GPU and
    hour what it costs a month. None where the target was not reached."""
    base = needed[BASELINE].gpus if BASELINE in needed else None
    found = {}
    for policy, each in needed.items():
        saved = 1 - each.gpus / base if each.gpus is not None and base is not None else None
        found[policy] = {
            "gpus": each.gpus,
            "saving": None if saved is None else round(saved, 4),
            "attainment": {str(gpus): reached for gpus, reached in sorted(each.tried.items())},
        }
        if price is not None:
            cost = None if each.gpus is None else round(each.gpus * price * HOURS_A_MONTH, 2)
            found[policy]["cost_per_month"] = cost
    return found


def plan_lines(found: dict[str, dict[str, Any]], target: float, most: int) -> list[str]:
    """The result for people."""

    def cells(policy: str, each: dict[str, Any]) -> tuple[str, ...]:
        gpus, saved = each["gpus"], each["saving"]
        cost = each.get("cost_per_month")
        return (
            policy,
            f"more than {most}" if gpus is None else str(gpus),
            "-" if saved is None else f"{saved:.0%}",
            "-" if cost is None else f"{cost:,.0f}",
        )

    header = ("policy", f"gpus for {target:.1%}", f"saved of {BASELINE}", "cost a month")
    return aligned(header, [cells(policy, each) for policy, each in found.items()], right=(1, 2, 3))


@click.command("plan")
@scenario_options
@click.option(
    "--target",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.99,
    show_default=True,
    help="Share of the requests that are to meet their objectives.",
)
@click.option(
    "--attainment",
    "which",
    type=click.Choice(["both", "ttft", "tpot"]),
    default="both",
    show_default=True,
    help="Which objectives.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help="Only these policies; may be given several times.  [default: all]",
)
@click.option("--max-gpus", type=click.IntRange(min=1), default=64, show_default=True, help="Give up beyond.")
@initial_placement_option("search")
@click.option("--price", type=click.FloatRange(min=0), help="Of a GPU for an hour, in any currency.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("prism-plan.png"),
    show_default=True,
    help="Where to draw attainment over GPUs.",
)
def plan_command(
    asked: Asked,
    target: float,
    which: str,
    policies: tuple[str, ...],
    max_gpus: int,
    initial_placement: str,
    price: float | None,
    plot: Path,
) -> None:
    """Find the least number of GPUs that a trace needs under each policy."""
    with clean_end():
        scenario = read_scenario(asked)
        needed = needed_by_policy(
            scenario,
            policies or tuple(placement_policies.policies),
            target,
            most=max_gpus,
            which=f"{which}_attainment",
            search=initial_placement == "search",
            seed=asked.seed,
            on_run=lambda policy, gpus, reached: click.echo(
                f"{policy} on {gpus} GPUs: {reached:.2%}", err=True
            ),
            **asked.settings,
        )
        found = savings(needed, price)
        try:
            plot_lines(
                {policy: list(each.tried.items()) for policy, each in needed.items()},
                plot,
                title=f"Requests within their objectives, {len(scenario.models)} models",
                x="GPUs",
                y=f"{which} attainment",
                target=target,
            )
        except (OSError, ValueError) as error:
            raise PrismError(ErrorCode.INVALID_REQUEST, f"plot {plot} cannot be written: {error}") from error
        if asked.as_json:
            result = {"target": target, "attainment": which, "baseline": BASELINE, "policies": found}
            click.echo(json.dumps({**result, "plot": str(plot)}))
            return
        click.echo("\n".join([*plan_lines(found, target, max_gpus), f"plot: {plot}"]))
