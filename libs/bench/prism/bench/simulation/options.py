"""What the commands around the simulator have in common: their options, and how they end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec

from prism.bench.simulation.profiles import (
    DEFAULT,
    read_measured_costs,
    read_profile,
)
from prism.bench.simulation.scenario import Scenario, make_scenario, read_models
from prism.bench.traces.reading import read_trace
from prism.bench.traces.trace import head, replicated
from prism.common.errors import ErrorCode, PrismError
from prism.scheduling import admission as admission_policies
from prism.scheduling.memory import GB
from prism.scheduling.profiles import profile_names

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_SCENARIO: tuple[Decorator, ...] = (
    click.option(
        "--trace",
        "traces",
        type=click.Path(path_type=Path),
        multiple=True,
        required=True,
        help="Requests over time: Prism's columns, Azure's or BurstGPT's. May be given several times.",
    ),
    click.option(
        "--models", "models", type=click.Path(path_type=Path), required=True, help="A placement file."
    ),
    click.option(
        "--gpu-memory-gb",
        type=click.FloatRange(min=0, min_open=True),
        help="Memory of a GPU that models may take, in GB.  [default: the profile's]",
    ),
    click.option(
        "--profile",
        default=DEFAULT,
        show_default=True,
        help=f"What a GPU reaches: {', '.join(profile_names())}, or a file of `prism calibrate`.",
    ),
    click.option(
        "--ttft-scale",
        type=click.FloatRange(min=0, min_open=True),
        default=5.0,
        show_default=True,
        help="Objective of the time to the first token: so many times the model's P95 alone on such a GPU.",
    ),
    click.option(
        "--tpot-scale",
        type=click.FloatRange(min=0, min_open=True),
        default=5.0,
        show_default=True,
        help="The same for the time per token after the first.",
    ),
    click.option(
        "--rate-scale",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Divides all gaps between arrivals.",
    ),
    click.option(
        "--replicate", type=click.IntRange(min=1), default=1, show_default=True, help="Copies of the trace."
    ),
    click.option(
        "--seconds", type=click.FloatRange(min=0, min_open=True), help="Only the trace's first seconds."
    ),
    click.option(
        "--map",
        "mapping",
        multiple=True,
        metavar="TRACE_MODEL=MODEL",
        help="Which model serves a model of the trace.  [default: the same name, the others by popularity]",
    ),
    click.option(
        "--context-length",
        type=click.IntRange(min=1),
        help="Serve contexts of at most so many tokens.  [default: each model's own]",
    ),
    click.option(
        "--admission",
        default=admission_policies.DEFAULT_POLICY,
        show_default=True,
        help=f"Who goes first on a GPU: {', '.join(sorted(admission_policies.policies))}.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the search for placements."),
    click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object."),
)


class Asked(msgspec.Struct, frozen=True):
    """What the common options say, by their names."""

    traces: tuple[Path, ...]
    models: Path
    gpu_memory_gb: float | None
    profile: str
    ttft_scale: float
    tpot_scale: float
    rate_scale: float
    replicate: int
    seconds: float | None
    mapping: tuple[str, ...]
    context_length: int | None
    admission: str
    seed: int
    as_json: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Those that `simulate` takes as they are."""
        return {
            "admission": self.admission,
            "ttft_scale": self.ttft_scale,
            "tpot_scale": self.tpot_scale,
            "rate_scale": self.rate_scale,
        }


def scenario_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what is simulated; `command` gets them first and together, as `Asked`."""

    @wraps(command)
    def gathered(**given: Any) -> None:
        asked = Asked(**{name: given.pop(name) for name in Asked.__struct_fields__})
        command(asked, **given)

    decorated: Callable[..., None] = gathered
    for option in reversed(_SCENARIO):
        decorated = option(decorated)
    return decorated


def initial_placement_option(default: str) -> Decorator:
    """Where models start."""
    return click.option(
        "--initial-placement",
        type=click.Choice(["file", "search"]),
        default=default,
        show_default=True,
        help="Where models start: as the file says, or the best that a search finds that knows the trace.",
    )


def read_scenario(asked: Asked) -> Scenario:
    """The scenario that the options ask for. Raises PrismError(invalid_request)."""
    gpu = read_profile(asked.profile)
    memory = round(asked.gpu_memory_gb * GB) if asked.gpu_memory_gb is not None else gpu.memory_bytes
    trace = read_trace(asked.traces)
    if asked.seconds is not None:
        trace = head(trace, asked.seconds)
        if not len(trace):
            raise PrismError(
                ErrorCode.INVALID_REQUEST, f"no requests in the trace's first {asked.seconds:g} s"
            )
    targets = {}
    for pair in asked.mapping:
        source, equals, target = pair.partition("=")
        if not equals:
            raise PrismError(ErrorCode.INVALID_REQUEST, f"--map {pair!r}: it has to be TRACE_MODEL=MODEL")
        targets[source] = target
    served = read_models(asked.models, gpu, asked.context_length, read_measured_costs(asked.profile))
    return make_scenario(replicated(trace, asked.replicate), served, gpu, memory, targets)


@contextmanager
def clean_end() -> Iterator[None]:
    """Errors of the user's as one line and status 1."""
    try:
        yield
    except PrismError as error:
        click.echo(f"prism: {error.message}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def warn(warnings: list[str]) -> None:
    """Tell people, not programs."""
    for warning in warnings:
        click.echo(f"prism: warning: {warning}", err=True)
