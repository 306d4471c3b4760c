"""`python -m prism.bench.activation`: how fast models sleep and wake on a GPU.

`cell NAME` measures one cell and writes its rows; `merge FILE...` makes docs/results/activation.json of cells
that were measured at one commit, since GPU time comes in pieces.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import click

from prism.bench.activation.merging import merge_cells, write_cell
from prism.bench.results import Row, table

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """How fast models sleep and wake on a GPU."""


@main.command("cell")
@click.argument("names", nargs=-1, required=True)
@click.option("--models", type=FOLDER, default=Path("build/bench-models"), show_default=True)
@click.option("--out", type=FOLDER, default=Path("build/bench-activation"), show_default=True)
def cell_command(names: tuple[str, ...], models: Path, out: Path) -> None:
    """Measure cells NAMES (wake_1b, wake_8b, ..., cycles) into files of --out; a GPU is needed."""
    from prism.bench.activation.cells import cells

    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        known = cells(models, out / f"{name}.log")
        if name not in known:
            raise click.ClickException(f"there is no cell {name}; there are {', '.join(known)}")
        rows = asyncio.run(_measured(known[name]))
        print(table(rows), flush=True)
        write_cell(out / f"{name}.json", name, rows)


async def _measured(cell: "Callable[[], Awaitable[list[Row]]]") -> "list[Row]":
    return await cell()


@main.command("merge")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def merge_command(files: tuple[Path, ...]) -> None:
    """Write docs/results/activation.json from the cells' FILES."""
    try:
        click.echo(merge_cells("activation", files, Path.cwd()))
    except (ValueError, json.JSONDecodeError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
