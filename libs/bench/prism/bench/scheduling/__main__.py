"""`python -m prism.bench.scheduling`: run the cells that are missing, judge them all, write
`docs/results/scheduling.json`, `scheduling_admission.json`, `scheduling_speed.json` and their plots."""

import statistics
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from prism.bench.results import Row, missed, row, table, write_results
from prism.bench.scheduling.admission_experiment import FACTOR, LONG, SHORT, compare
from prism.bench.scheduling.admission_experiment import POLICIES as ADMISSIONS
from prism.bench.scheduling.admission_time import worker_admission_times
from prism.bench.scheduling.cells import (
    TARGET,
    TPOT_SCALE,
    TTFT_SCALE,
    Cell,
    cells_folder,
    read_cells,
    run_cells,
)
from prism.bench.scheduling.plan_time import SIZES, TARGET_S, growth, plan_times
from prism.bench.scheduling.speed import simulator_speed
from prism.bench.scheduling.workloads import WORKLOADS, Workload
from prism.bench.simulation.plots import plot_lines
from prism.scheduling.placement import policies

POLICIES = tuple(policies)
BEST = "balanced"
MILLION = 1_000_000
QUEUED = 10_000
OVERLOADED_REQUESTS = 20_000

RESULTS = Path("docs/results")

Rates = dict[tuple[str, int, str, int], dict[float, float]]
"""Both-attainment by rate, of each workload, number of GPUs, policy and seed."""


def attainments(cells: list[tuple[Cell, dict[str, Any]]]) -> Rates:
    """What cells of kind `rates` came to."""
    return {
        (cell.workload, cell.gpus, cell.policy, cell.seed): {
            float(rate): result["both_attainment"] for rate, result in found["rates"].items()
        }
        for cell, found in cells
        if cell.kind == "rates"
    }


def area(points: dict[float, float]) -> float:
    """Under attainment over rate, as a share of the whole rectangle."""
    ordered = sorted(points.items())
    whole = ordered[-1][0] - ordered[0][0]
    return sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(ordered)) / whole


def compared(found: Rates, load: Workload) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of one workload, and the cases in which the default policy is not at the top, with what
    was."""
    settings = sorted({(gpus, seed) for name, gpus, _, seed in found if name == load.name})
    cases, failed = 0, []
    worst = 0.0
    ratios = []
    for gpus, seed in settings:
        by_policy = {policy: found.get((load.name, gpus, policy, seed)) for policy in POLICIES}
        mine = by_policy[BEST]
        others = {policy: points for policy, points in by_policy.items() if points and policy != BEST}
        if mine is None or not others:
            continue
        for rate, reached in mine.items():
            cases += 1
            top, best = max((points[rate], policy) for policy, points in others.items())
            worst = max(worst, top - reached)
            if reached < top:
                case = {
                    "workload": load.name,
                    "gpus": gpus,
                    "seed": seed,
                    "rate": rate,
                    BEST: reached,
                    best: top,
                }
                failed.append(case)
        held = [rate for rate, reached in mine.items() if reached >= TARGET]
        static = others.get("static")
        if held and static:
            ratios.append(mine[max(held)] / max(static[max(held)], 1e-9))
    seeds = len({seed for _, seed in settings})
    name, note = load.name, f"{seeds} seeds, {load.gpus} GPUs, rates {load.rates}"
    if not cases:
        return [], []
    rows = [
        row(f"at_the_top_{name}_share", round(1 - len(failed) / cases, 4), "ratio", target=0.9,
            better="higher",
            note=f"{cases - len(failed)} of {cases} cases at or above every other policy; {note}"),
        row(f"below_the_best_{name}_points", round(100 * worst, 2), "points", target=1.0,
            note="the worst case" + _reason(failed)),
    ]  # fmt: skip
    if ratios:
        rows.append(
            row(
                f"over_static_at_99_{name}_ratio",
                round(max(ratios), 3),
                "ratio",
                note=f"over static's attainment at the highest rate at which {BEST} holds 99%; best seed",
            )
        )
    for gpus in load.gpus:
        for policy in POLICIES:
            of = [points for key, points in found.items() if key[:3] == (name, gpus, policy)]
            if of:
                mean = round(statistics.mean(area(points) for points in of), 4)
                rows.append(row(f"area_{name}_{gpus}_{policy}", mean, "ratio", note="mean of the seeds"))
    return rows, failed


def _reason(failed: list[dict[str, Any]]) -> str:
    if not failed:
        return ""
    worst = max(failed, key=lambda case: max(v for k, v in case.items() if k in POLICIES) - case[BEST])
    told = ", ".join(f"{policy} {worst[policy]:.3f}" for policy in POLICIES if policy in worst)
    return f": {worst['gpus']} GPUs, seed {worst['seed']} at {worst['rate']:g} times the rate, {told}"


def fleets(cells: list[tuple[Cell, dict[str, Any]]]) -> list[Row]:
    """GPUs for 99%, the mean of the seeds; a seed that no number up to the limit was enough for counts as
    that."""
    needed: dict[tuple[str, str], list[int]] = defaultdict(list)
    limits = {load.name: load.most_gpus for load in WORKLOADS}
    rates = {load.name: load.fleet_rate for load in WORKLOADS}
    for cell, found in cells:
        if cell.kind == "gpus":
            needed[cell.workload, cell.policy].append(found["gpus"] or limits[cell.workload])
    rows = []
    for (name, policy), counts in sorted(needed.items()):
        note = f"{len(counts)} seeds at {rates[name]:g} times the rate, at most {limits[name]}"
        rows.append(row(f"gpus_{name}_{policy}", round(statistics.mean(counts), 2), "gpus", note=note))
    for load in WORKLOADS:
        means = {
            policy: statistics.mean(needed[load.name, policy])
            for policy in POLICIES
            if needed.get((load.name, policy))
        }
        if BEST not in means:
            continue
        for other, target in (("static", 0.5), ("kvpr", None)):
            if other in means:
                share = round(means[BEST] / means[other], 3)
                goal = target if target is not None else 0.999
                rows.append(
                    row(f"gpus_{load.name}_over_{other}_ratio", share, "ratio", target=goal,
                        note=f"{BEST} {means[BEST]:g}, {other} {means[other]:g} GPUs for 99%")
                )  # fmt: skip
    return rows


def admission_rows(seeds: int) -> list[Row]:
    """Moore-Hodgson against the others where objectives are far apart."""
    rows = []
    for name, prompts in (("", LONG), ("short_", SHORT)):
        for load in prompts.loads:
            rows += _admission_rows(f"{name}load_{round(load * 100)}", [
                compare(load, seed, prompts) for seed in range(seeds)
            ])  # fmt: skip
    best = max(
        (each.value or 0.0, each.figure) for each in rows if each.figure.startswith("tight_gain_load_")
        and each.figure.endswith("over_first_come")
    )  # fmt: skip
    rows.append(
        row("tight_gain_over_first_come", best[0], "ratio", target=0.4, better="higher", note=best[1])
    )
    return rows


def _admission_rows(tag: str, runs: list[dict[str, dict[str, Any]]]) -> list[Row]:
    rows = []
    mean = {policy: statistics.mean(run[policy]["tight"] for run in runs) for policy in ADMISSIONS}
    for policy in ADMISSIONS:
        every = statistics.mean(run[policy]["all"] for run in runs)
        rows.append(
            row(f"tight_attainment_{tag}_{policy}", round(mean[policy], 4), "ratio",
                note=f"objectives {FACTOR:g} times apart; all requests {every:.3f}; {len(runs)} seeds")
        )  # fmt: skip
    for other in ADMISSIONS[1:]:
        gain = round(mean[ADMISSIONS[0]] / max(mean[other], 1e-9) - 1, 4)
        rows.append(row(f"tight_gain_{tag}_over_{other}", gain, "ratio"))
    rows.append(
        row(f"starved_{tag}", sum(run[ADMISSIONS[0]]["unserved"] for run in runs), "requests", target=0,
            better="equal", note="without a first token; longest wait "
            f"{max(run[ADMISSIONS[0]]['longest_wait_in_objectives'] for run in runs):.1f} objectives")
    )  # fmt: skip
    return rows


def speed_rows(root: Path) -> list[Row]:
    """Of the simulator and of a plan."""
    moderate = simulator_speed(MILLION)
    overloaded = simulator_speed(OVERLOADED_REQUESTS, overload=True)
    note = (
        f"attainment {moderate['both_attainment']:.3f}, longest queue {moderate['longest_queue']}, "
        f"{moderate['admission_decisions']:,} admission decisions, {moderate['plans']:,} plans, one core"
    )
    running = plan_times()
    largest = max((each for each in running if each.models == max(SIZES)), key=lambda each: each.seconds)
    plot_lines(
        {
            case: [(each.models, each.seconds) for each in running if each.case == case]
            for case in sorted({each.case for each in running})
        },
        root / RESULTS / "scheduling_plan_time.svg",
        title="one plan of balanced, a GPU for ten models",
        x="models",
        y="seconds",
        percent=False,
    )
    deciding = worker_admission_times("moore_hodgson", QUEUED)
    slowest = max(deciding, key=lambda each: each.median_s)
    told = f"attainment {overloaded['both_attainment']:.3f}, longest queue {overloaded['longest_queue']}"
    return [
        row("simulated_million_s", round(moderate["seconds"], 1), "s", target=60.0, note=note),
        row("simulated_overloaded_requests_per_s", round(overloaded["requests_per_s"]), "1/s",
            note=told),
        row("admission_10000_queued_ms", round(1000 * slowest.median_s, 2), "ms", target=10.0,
            note=f"median of a decision's processor time, queue {slowest.load}; "
            f"the longest single one {1000 * max(each.worst_s for each in deciding):.1f} ms"),
        row("plan_10000_models_s", round(largest.seconds, 3), "s", target=TARGET_S,
            note=f"processor time of one plan on {largest.gpus} GPUs, the slower case: {largest.case}"),
        row("plan_growth_exponent", round(growth([each for each in running if each.case == "running"]), 3),
            "exponent"),
    ]  # fmt: skip


def draw(found: Rates, folder: Path) -> None:
    """Attainment over rate, the mean of the seeds, a plot a workload."""
    for load in WORKLOADS:
        for gpus in load.gpus:
            _draw_one(found, folder, load, gpus)


def _draw_one(found: Rates, folder: Path, load: Workload, gpus: int) -> None:
    series = {}
    for policy in POLICIES:
        runs = [points for key, points in found.items() if key[:3] == (load.name, gpus, policy)]
        if runs:
            series[policy] = [
                (rate, statistics.mean(points[rate] for points in runs)) for rate in sorted(runs[0])
            ]
    if series:
        plot_lines(
            series,
            folder / f"scheduling_{load.name}_{gpus}.svg",
            title=f"{load.name}, {gpus} GPUs, objectives {TTFT_SCALE:g} and {TPOT_SCALE:g} x alone",
            x="times the rate",
            y="both objectives met",
            target=TARGET,
        )


@click.command()
@click.option("--seeds", default=10, show_default=True, help="Seeds of each workload.")
@click.option("--workload", "names", multiple=True, help="Only these.  [default: all]")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(["rates", "gpus", "admission", "speed"]))
@click.option("--root", type=click.Path(path_type=Path), default=Path())
def main(seeds: int, names: tuple[str, ...], kinds: tuple[str, ...], root: Path) -> None:
    """Compare the schedulers. Cells that are done are kept in build/bench-scheduling for as long as the
    sources stay as they are."""
    root = root.resolve()
    folder = cells_folder(root)

    def all_cells(count: int, chosen: tuple[str, ...]) -> list[Cell]:
        return [
            Cell(kind, load.name, policy, seed, gpus)
            for seed in range(count)
            for load in WORKLOADS
            for kind in ("rates", "gpus")
            if load.name in chosen and (kind == "rates" or load.most_gpus)
            for gpus in (load.gpus if kind == "rates" else (0,))
            for policy in POLICIES
        ]

    every = tuple(load.name for load in WORKLOADS)
    wanted = [cell for cell in all_cells(seeds, names or every) if not kinds or cell.kind in kinds]
    groups = {
        "scheduling": ("rates", "gpus"),
        "scheduling_admission": ("admission",),
        "scheduling_speed": ("speed",),
    }
    for name, members in groups.items():
        if kinds and not set(kinds) & set(members):
            continue
        details: dict[str, Any] = {}
        if name == "scheduling":
            run_cells(wanted, folder, root, lambda line: click.echo(line, err=True))
            rows, details = _comparison(list(read_cells(all_cells(seeds, every), folder)), root)
        elif name == "scheduling_admission":
            rows = admission_rows(seeds)
        else:
            rows = speed_rows(root)
        path = write_results(
            name,
            rows,
            command=" ".join(["python -m prism.bench.scheduling", *sys.argv[1:]]),
            root=root,
            packages=("numpy", "msgspec", "matplotlib"),
            details=details,
        )
        click.echo(table(rows))
        click.echo(f"{path}: {len(missed(rows))} targets missed")


def _comparison(done: list[tuple[Cell, dict[str, Any]]], root: Path) -> tuple[list[Row], dict[str, Any]]:
    """What the policies came to, with the cases where another was above the default; plots are drawn."""
    found = attainments(done)
    rows: list[Row] = []
    failures: list[dict[str, Any]] = []
    for load in WORKLOADS:
        more, failed = compared(found, load)
        rows += more
        failures += failed
    ratios = [
        (each.value or 0.0, each.figure) for each in rows if each.figure.startswith("over_static_at_99")
    ]
    if ratios:
        top = max(ratios)
        rows.append(
            row("over_static_at_99_ratio", top[0], "ratio", target=3.3, better="higher",
                note=f"best: {top[1]}")
        )  # fmt: skip
    rows += fleets(done)
    draw(found, root / RESULTS)
    return rows, {
        "ttft_scale": TTFT_SCALE,
        "tpot_scale": TPOT_SCALE,
        "policies": list(POLICIES),
        "failing_cases": failures,
    }


if __name__ == "__main__":
    main()
