"""Rows of text in aligned columns, as a terminal and `grep` like them."""

from collections.abc import Iterable, Sequence


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Lines of a table, its header in capitals; the columns numbered in `right` end together, the others
    start together."""
    table = [[name.upper() for name in header], *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def megabytes(count: float) -> str:
    """Bytes as people read them: in MB below 10 GB, in GB above."""
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{count / 1e6:.0f} MB"


def seconds(count: float) -> str:
    """A time as people read it: to the tenth of a second below 10 s, then s, min, h."""
    if count < 10:
        return f"{count:.1f} s"
    if count < 120:
        return f"{count:.0f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.0f} h"
