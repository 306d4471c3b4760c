"""Cells of the comparison: one policy on one workload with one seed. Each is kept in a file when it is done,
so that a run that was stopped goes on where it was."""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from prism.bench.scheduling.workloads import scenario_of, workload
from prism.bench.simulation.capacity import least_gpus
from prism.bench.simulation.initial_placement import searched_placements
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import simulate
from prism.common.errors import PrismError

TARGET = 0.99
TTFT_SCALE, TPOT_SCALE = 8.0, 5.0
ADMISSION = "moore_hodgson"
DEPENDS_ON = (
    "libs/scheduling",
    "libs/bench/prism/bench/simulation",
    "libs/bench/prism/bench/scheduling",
    "libs/bench/prism/bench/traces",
)


class Cell(msgspec.Struct, frozen=True):
    """`kind` is `rates` (attainment at each rate on so many `gpus`) or `gpus` (the least number of them).
    Both begin with the best initial placement that a search finds for that rate and that number."""

    kind: str
    workload: str
    policy: str
    seed: int
    gpus: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.workload}-{self.gpus}-{self.policy}-{self.seed}"


def run_cell(cell: Cell, root: Path) -> dict[str, Any]:
    """What the cell comes to."""
    load = workload(cell.workload)
    scenario = scenario_of(load, cell.seed, root)
    settings: dict[str, Any] = {
        "policy": cell.policy,
        "admission": ADMISSION,
        "ttft_scale": TTFT_SCALE,
        "tpot_scale": TPOT_SCALE,
    }
    if cell.kind == "gpus":

        def measure(gpus: int) -> float:
            rate = load.fleet_rate
            placements = searched_placements(
                scenario, gpus=gpus, seed=cell.seed, rate_scale=rate, enough=TARGET, **settings
            )
            outcome = simulate(scenario, gpus=gpus, rate_scale=rate, placements=placements, **settings)
            return report(outcome)["both_attainment"] or 0.0

        least = max(model.spec.tp_size for model in scenario.models)
        needed = least_gpus(measure, TARGET, least=least, most=load.most_gpus)
        return {"gpus": needed.gpus, "tried": {str(gpus): value for gpus, value in needed.tried.items()}}
    found = {}
    for rate in load.rates:
        placements = searched_placements(
            scenario, gpus=cell.gpus, seed=cell.seed, rate_scale=rate, **settings
        )
        outcome = simulate(scenario, gpus=cell.gpus, rate_scale=rate, placements=placements, **settings)
        result = report(outcome)
        result.pop("models")
        found[str(rate)] = result
    return {"rates": found}


def cells_folder(root: Path) -> Path:
    """Where cells are kept: one folder for each state of the sources that they depend on, so that none
    outlives a change of a policy, of the simulator or of a workload."""
    digest = hashlib.sha256()
    for part in DEPENDS_ON:
        for path in sorted((root / part).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.read_bytes())
    return root / "build" / "bench-scheduling" / digest.hexdigest()[:12]


def run_cells(cells: Sequence[Cell], folder: Path, root: Path, tell: Callable[[str], None]) -> None:
    """Run those that have no file yet, on all cores."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not _path(folder, cell).exists()]
    tell(f"{len(cells) - len(todo)} cells are there, {len(todo)} to do")
    jobs = [(cell, folder, root) for cell in todo]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs) or 1, len(os.sched_getaffinity(0)))) as pool:
        for done, line in enumerate(pool.imap_unordered(_work, jobs), 1):
            tell(f"{done}/{len(todo)} {line}")


def read_cells(cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Those that are done."""
    for cell in cells:
        path = _path(folder, cell)
        if path.exists():
            yield cell, json.loads(path.read_text())


def _work(job: tuple[Cell, Path, Path]) -> str:
    cell, folder, root = job
    began = time.perf_counter()
    try:
        found = run_cell(cell, root)
    except PrismError as error:
        return f"{cell.name}: {error.message}"
    path = _path(folder, cell)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(found))
    beside.replace(path)
    return f"{cell.name}: {time.perf_counter() - began:.1f} s"


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"
