"""`python -m tests.chaos`: faults under traffic, then a clean end; a table and docs/results/chaos.json."""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.chaos.campaign import FaultReport, learn_answers, run_campaign
from tests.chaos.faults import FAULTS, SHORT
from tests.chaos.stage import WORKER_MEMORY_GB, prompts_of, stage
from tests.leftovers import Leftovers
from tests.processes import descendants

from prism.bench.results import Row, row, write_results
from prism.cli.tiny_models import make_tiny_models

ROOT = Path(__file__).parents[2]
LEFTOVERS_DEADLINE_S = 10.0
LONGEST_S = 600
LONGEST_NOTE = 500
COLUMNS = f"{'fault':>20} {'requests':>9} {'lost':>5} {'doubled':>8} {'wrong':>6} {'refused':>8} {'broken':>7} {'worst stall':>12} {'right after':>12}"  # noqa: E501


def table_line(report: FaultReport) -> str:
    """One fault as a line of the table."""
    return (
        f"{report.fault:>20} {report.requests:>9} {report.lost:>5} {report.doubled:>8} {report.wrong:>6} "
        f"{report.refused:>8} {report.broken:>7} "
        f"{report.worst_stall_s:>10.2f} s {report.recovered_s:>10.2f} s"
    )


async def run(seed: int, names: list[str], log: Path) -> int:
    """Run the faults in `names`. Returns the exit status."""
    models = make_tiny_models(ROOT / "build" / "tiny-models", report=lambda line: None)
    faults = [fault for fault in FAULTS if fault.name in names]
    began = time.monotonic()
    print(COLUMNS)

    def tell(report: FaultReport) -> None:
        print(table_line(report), flush=True)
        for line in report.wrong_after + report.details:
            print(f"{'':>20}   {line[:200]}", flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        leftovers = Leftovers(Path(folder) / "tmp")
        # For the launcher, which this process is, and all that it starts.
        os.environ.update(leftovers.environment)
        tempfile.tempdir = None
        async with stage(Path(folder), models, log) as running:
            questions = await learn_answers(running.gateways()[0], prompts_of(models))

            def note_all() -> None:
                # What a fault ends is in nobody's list any more by the end; its engines may live on.
                leftovers.note(descendants(os.getpid()))

            reports = await run_campaign(
                running, faults, questions, seed=seed, before_fault=note_all, on_report=tell
            )
            note_all()
        left = leftovers.found(LEFTOVERS_DEADLINE_S)
    for line in left:
        print(f"left behind: {line}")
    seconds = time.monotonic() - began
    print(f"{'all':>20} {sum(report.requests for report in reports):>9}   in {seconds:.0f} s, seed {seed}")
    return _store(reports, left, seed, seconds)


def _store(reports: list[FaultReport], left: list[str], seed: int, seconds: float) -> int:
    lost = sum(report.lost for report in reports)
    doubled = sum(report.doubled for report in reports)
    wrong = sum(report.wrong for report in reports)
    broken = sum(report.broken_without_cause for report in reports)
    by_their_gateway = sum(report.broken for report in reports) - broken
    not_right = [line for report in reports for line in report.wrong_after]
    told = [f"{report.fault}: {line}" for report in reports for line in report.details]
    rows = [
        row("requests", sum(report.requests for report in reports), "count"),
        _none("requests_lost", lost, told),
        _none("requests_doubled", doubled, told),
        _none("requests_wrong", wrong, told),
        _none("streams_broken", broken, told),
        row(
            "streams_broken_with_their_gateway",
            by_their_gateway,
            "count",
            note="answers under way at a gateway that was killed; their clients asked the other one",
        ),
        _none("leftovers", len(left), left),
        _none("not_right_afterwards", len(not_right), not_right),
        row("faults", len(reports), "count"),
        row(
            "duration_s",
            round(seconds, 1),
            "s",
            target=LONGEST_S,
            note=""
            if seconds <= LONGEST_S
            else "longer than aimed at; details tell how long each fault took",
        ),
    ]
    for report in reports:
        name = report.fault.replace(" ", "_")
        rows.append(row(f"worst_stall_{name}_s", round(report.worst_stall_s, 2), "s"))
    path = write_results(
        "chaos",
        rows,
        command=f"make chaos SEED={seed}",
        root=ROOT,
        packages=["sglang", "nats-py"],
        details={
            "seed": seed,
            "worker_memory_gb": WORKER_MEMORY_GB,
            "faults": [asdict(report) for report in reports],
            "leftovers": left,
        },
    )
    print(f"written to {path.relative_to(ROOT)}")
    return 1 if lost or doubled or wrong or broken or left or not_right else 0


def _none(figure: str, count: int, reasons: list[str]) -> Row:
    """A count that should be 0, with `reasons` when it is not."""
    note = "; ".join(reasons)[:LONGEST_NOTE] if count else ""
    return row(figure, count, "count", target=0, better="equal", note=note)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Faults under traffic")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="only " + ", ".join(SHORT))
    parser.add_argument("--fault", action="append", help="only these (may be repeated)")
    parser.add_argument(
        "--log", type=Path, default=ROOT / "build" / "chaos.log", help="what the services log"
    )
    options = parser.parse_args()
    names = options.fault or (SHORT if options.short else [fault.name for fault in FAULTS])
    options.log.parent.mkdir(parents=True, exist_ok=True)
    return asyncio.run(run(options.seed, names, options.log))


if __name__ == "__main__":
    sys.exit(main())
