"""Plots of what was simulated."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

Series = Mapping[str, Sequence[tuple[float, float]]]


def plot_lines(
    series: Series,
    path: Path,
    *,
    title: str,
    x: str,
    y: str,
    target: float | None = None,
    percent: bool = True,
) -> None:
    """Lines through the points of each of `series`, in the order of x, written to `path` (its suffix says
    what kind of file); `target` is drawn as a level."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    try:
        for (name, points), marker in zip(series.items(), "os^vDPX*hd" * len(series), strict=False):
            ordered = sorted(points)
            scale = 100 if percent else 1
            axes.plot(
                [point[0] for point in ordered],
                [point[1] * scale for point in ordered],
                marker=marker,
                markersize=4,
                linewidth=1.4,
                label=name,
            )
        if target is not None:
            axes.axhline(target * (100 if percent else 1), color="0.6", linestyle="--", linewidth=1)
        axes.set(title=title, xlabel=x, ylabel=f"{y} (%)" if percent else y)
        axes.grid(color="0.9")
        axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, bbox_inches="tight", metadata=metadata)
    finally:
        pyplot.close(figure)
