"""`python -m prism.bench.traces`: write a synthetic trace as a file that `prism simulate` reads."""

from pathlib import Path

import click

from prism.bench.traces.reading import write_trace
from prism.bench.traces.synthetic import Synthetic, long_tailed_trace, synthetic_trace


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--models", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=4.0, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Its length.",
)
@click.option(
    "--cv", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Of the gaps."
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=0, min_open=True),
    default=2.1,
    show_default=True,
    help="How much the hottest models are asked for.",
)
@click.option(
    "--on", "on_s", type=click.FloatRange(min=0), default=0.0, help="Seconds that a model is asked for."
)
@click.option("--off", "off_s", type=click.FloatRange(min=0), default=0.0, help="Seconds that it is silent.")
@click.option(
    "--chats/--uniform", default=True, show_default=True, help="Lengths as in chats, or 256 to 512."
)
@click.option("--seed", type=int, default=42, show_default=True)
def main(
    path: Path,
    models: int,
    rate: float,
    seconds: float,
    cv: float,
    alpha: float,
    on_s: float,
    off_s: float,
    chats: bool,
    seed: int,
) -> None:
    """Write a trace of MODELS models, `model-0` the hottest, to PATH."""
    shape = Synthetic(rate=rate, duration_s=seconds, cv=cv, alpha=alpha, on_s=on_s, off_s=off_s)
    make = long_tailed_trace if chats else synthetic_trace
    trace = make([f"model-{index}" for index in range(models)], shape, seed)
    try:
        write_trace(trace, path)
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error
    click.echo(f"{path}: {len(trace)} requests in {trace.duration_s:.1f} s")


if __name__ == "__main__":
    main()
