"""`python -m prism.bench.calibration`: the simulator against a real worker, on a CPU or a GPU.

Writes `docs/results/calibration.json`, for GPUs `calibration_cuda.json`.
"""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import click
import msgspec

from prism.bench.calibration.checking import SCALE, check
from prism.bench.calibration.setups import SETUPS
from prism.bench.results import missed, table, write_results
from prism.bench.simulation.profiles import write_profile
from prism.cli.demo import DEFAULT_FOLDER
from prism.scheduling.profiles import FOLDER


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path())
@click.option("--models", "folder", type=click.Path(path_type=Path), default=DEFAULT_FOLDER)
@click.option("--device", type=click.Choice(list(SETUPS)), default="cpu", show_default=True)
@click.option("--admission", default="moore_hodgson", show_default=True)
@click.option("--log", type=click.Path(path_type=Path), default=Path("build/bench-calibration.log"))
@click.option(
    "--keep-profile", is_flag=True, help="Have the fitted profile come with Prism, by the device's name."
)
def main(root: Path, folder: Path, device: str, admission: str, log: Path, keep_profile: bool) -> None:
    """Fit the simulator to this machine's worker, and check it on another workload.

    Beside the log, in a file of its own, both times of each request of the check.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    checked = asyncio.run(check(SETUPS[device], folder, admission, log))
    log.with_suffix(".requests.json").write_bytes(msgspec.json.encode(checked.requests))
    rows = checked.rows
    # A missed target says why, and that is the usual reason here.
    busy = os.getloadavg()[1]
    cores = len(os.sched_getaffinity(0))
    if busy > cores + 1:
        said = f"; load average {busy:.1f} on {cores} cores: others used the machine meanwhile"
        rows = [replace(each, note=each.note + said) for each in rows]
    if keep_profile:
        write_profile(checked.profile, FOLDER / f"{device}.json", checked.costs)
    path = write_results(
        "calibration" if device == "cpu" else f"calibration_{device}",
        rows,
        command=f"make bench-calibration DEVICE={device}",
        root=root.resolve(),
        packages=("sglang", "torch", "numpy"),
        details={
            "profile": msgspec.to_builtins(checked.profile),
            "models": msgspec.to_builtins(checked.costs),
            "admission": admission,
            "objectives": f"{SCALE:g} times what each model reaches alone",
        },
    )
    click.echo(table(rows))
    click.echo(f"{path}: {len(missed(rows))} targets missed")


if __name__ == "__main__":
    main()
