"""The commands of a benchmark that is made of cells: `cell NAME...` measures some, `merge FILE...` joins
them.

Each cell runs alone in minutes, since GPU time comes in pieces; one that this commit has measured already is
not measured again.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import click

from prism.bench.cell_files import is_measured, merge_cells, write_cell
from prism.bench.results import Row, table

FOLDER = click.Path(file_okay=False, path_type=Path)
Cell = Callable[[], Awaitable[list[Row]]]
Cells = Callable[[Path, Path], dict[str, Cell]]
"""Every cell by name, given the folder of its models and the file of its log; called, it is measured."""


def cell_commands(name: str, what: str, cells: Cells) -> click.Group:
    """The commands of the benchmark `name`, which writes docs/results/<name>.json; `what` it is about."""
    group = click.Group(name, help=what)

    @group.command("cell")
    @click.argument("names", nargs=-1, required=True)
    @click.option("--models", type=FOLDER, default=Path("build/bench-models"), show_default=True)
    @click.option("--out", type=FOLDER, default=Path("build") / f"bench-{name}", show_default=True)
    @click.option("--again", is_flag=True, help="Measure also what this commit has measured already.")
    def cell_command(names: tuple[str, ...], models: Path, out: Path, again: bool) -> None:
        """Measure cells NAMES into files of --out; `list` names them all."""
        out.mkdir(parents=True, exist_ok=True)
        for each in names:
            known = cells(models, out / f"{each}.log")
            if each == "list":
                click.echo("\n".join(known))
                continue
            if each not in known:
                raise click.ClickException(f"there is no cell {each}; there are {', '.join(known)}")
            path = out / f"{each}.json"
            if is_measured(path, Path.cwd()) and not again:
                click.echo(f"{path}: measured at this commit already (--again measures it anew)")
                continue
            rows = asyncio.run(_measured(known[each]))
            print(table(rows), flush=True)
            write_cell(path, each, rows)

    @group.command("merge")
    @click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
    def merge_command(files: tuple[Path, ...]) -> None:
        """Write the results of the cells' FILES as one file."""
        try:
            click.echo(merge_cells(name, files, Path.cwd()))
        except (ValueError, json.JSONDecodeError) as error:
            raise click.ClickException(str(error)) from error

    return group


async def _measured(cell: Cell) -> list[Row]:
    return await cell()
