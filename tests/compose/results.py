"""What a run of the stack has shown, as rows of docs/results/compose.json."""

from dataclasses import asdict, dataclass
from pathlib import Path

from tests.compose.base_image import BaseImage
from tests.compose.docker_engine import Engine
from tests.compose.images import BuiltImage
from tests.compose.rehearsal import CLIENTS, Rehearsal

from prism.bench.results import Row, missed, row, table, write_results

REQUESTS_TARGET = 50
DURATION_TARGET_S = 600


@dataclass(frozen=True)
class Run:
    """All that one run has shown. `kept` is what images kept of this machine, `left` what is left on it."""

    engine: Engine
    base: BaseImage
    images: list[BuiltImage]
    rehearsal: Rehearsal
    kept: list[str]
    left: list[str]
    seconds: float


def rows_of(run: Run) -> list[Row]:
    """The figures."""
    rows = [row("base_image_s", round(run.base.seconds, 1), "s", note=f"{run.base.name}, {run.base.how}")]
    if run.engine.own:
        rows.append(row("engine_ready_s", round(run.engine.ready_s, 1), "s"))
    for image in run.images:
        cached = f"{image.steps_cached} of {image.steps} steps from the cache"
        rows.append(row(f"build_{image.service}_s", round(image.seconds, 1), "s", note=cached))
        rows.append(row(f"image_{image.service}_mb", round(image.size_bytes / 1e6), "MB"))
    rehearsal = run.rehearsal
    rows += [row(f"{name}_s", round(seconds, 1), "s") for name, seconds in rehearsal.seconds.items()]
    sent = len(rehearsal.exchanges)
    stall = max((each.stall_s for each in rehearsal.exchanges), default=0.0)
    return [
        *rows,
        row("requests_sent", sent, "count", target=REQUESTS_TARGET, better="higher"),
        row("requests_failed", len(rehearsal.failed), "count", target=0, better="equal"),
        row("requests_retried", rehearsal.retried, "count", note="refused or broken by a gateway that went"),
        row("worst_stall_s", round(stall, 2), "s"),
        row("kept_in_images", len(run.kept), "count", target=0, better="equal"),
        row("leftovers", len(run.left), "count", target=0, better="equal"),
        row("duration_s", round(run.seconds, 1), "s", target=DURATION_TARGET_S),
    ]


def store(run: Run, root: Path) -> bool:
    """Print the figures and write them down. Whether all is as it should be."""
    rows = rows_of(run)
    print(table(rows))
    for line in [*run.rehearsal.failed, *run.kept, *run.left]:
        print(f"   {line[:300]}")
    path = write_results(
        "compose",
        rows,
        command="make test-compose",
        root=root,
        packages=["nats-py"],
        versions={"docker engine": run.engine.version},
        details={
            "clients": CLIENTS,
            "engine": "started for the test" if run.engine.own else "was running",
            "images": [asdict(image) for image in run.images],
            "failed": run.rehearsal.failed,
            "connections_broken": run.rehearsal.breaks,
            "kept_in_images": run.kept,
            "leftovers": run.left,
        },
    )
    print(f"written to {path.relative_to(root)}")
    # How long it takes depends on what is in the caches, and is no fault of the stack.
    return not [each for each in missed(rows) if each.figure != "duration_s"]
