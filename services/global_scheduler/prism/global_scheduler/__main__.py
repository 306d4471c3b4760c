"""`python -m prism.global_scheduler`: places models on workers; several instances elect a leader."""

import asyncio
import logging
import sys
from pathlib import Path

import click

from prism.common.bus import connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.identity import instance_id
from prism.common.modes import DEFAULT_MODE, MODES, keeps_homes, keeps_kv_quotas, policy_in
from prism.common.placement_file import read_placement_file
from prism.common.process import run_service
from prism.common.telemetry import LOG_FORMATS, LOG_LEVELS, configure_logging
from prism.global_scheduler.scheduler import Deadlines
from prism.global_scheduler.service import run_global_scheduler
from prism.scheduling.placement import (
    DEFAULT_POLICY,
    BalancedPlacement,
    policies,
    policy_named,
)

log = logging.getLogger(__name__)


@click.command()
@click.option(
    "--nats",
    "nats_url",
    envvar="PRISM_NATS_URL",
    show_envvar=True,
    default="nats://127.0.0.1:4222",
    show_default=True,
)
@click.option(
    "--placement",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="PRISM_PLACEMENT_FILE",
    show_envvar=True,
    help="Placement file whose models to register. Without one, those that are registered already.",
)
@click.option(
    "--prune",
    is_flag=True,
    envvar="PRISM_PRUNE",
    show_envvar=True,
    help="Remove registered models that the placement file does not name.",
)
@click.option(
    "--policy",
    type=click.Choice(sorted(policies)),
    envvar="PRISM_PLACEMENT_POLICY",
    show_envvar=True,
    help=f"Decides which model is where in --mode full.  [default: {DEFAULT_POLICY}]",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    envvar="PRISM_MODE",
    show_envvar=True,
    default=DEFAULT_MODE,
    show_default=True,
    help="static, elastic: models stay at home, awake, by the policy static. Give workers the same mode.",
)
@click.option(
    "--patience-s",
    type=click.FloatRange(min=0),
    envvar="PRISM_PATIENCE_S",
    show_envvar=True,
    help="How long a request waits before models that are busy must make room.  [default: the policy's, 2]",
)
@click.option(
    "--min-active-s",
    type=click.FloatRange(min=0),
    envvar="PRISM_MIN_ACTIVE_S",
    show_envvar=True,
    default=BalancedPlacement.min_active_s,
    show_default=True,
    help="How long a busy model stays at least.",
)
@click.option(
    "--drain-s",
    type=click.FloatRange(min=0),
    envvar="PRISM_DRAIN_S",
    show_envvar=True,
    default=BalancedPlacement.drain_s,
    show_default=True,
    help="How long requests in flight may take to finish before their model sleeps.",
)
@click.option(
    "--activate-deadline-s",
    type=click.FloatRange(min=0, min_open=True),
    envvar="PRISM_ACTIVATE_DEADLINE_S",
    show_envvar=True,
    default=Deadlines().activate_s,
    show_default=True,
    help="How long an activation may take, the first build of a model included.",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    envvar="PRISM_LOG_LEVEL",
    show_envvar=True,
    default="INFO",
    show_default=True,
)
@click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    envvar="PRISM_LOG_FORMAT",
    show_envvar=True,
    default="text",
    show_default=True,
    help="json: one object a line.",
)
def main(
    nats_url: str,
    placement: Path | None,
    prune: bool,
    policy: str | None,
    mode: str,
    patience_s: float | None,
    min_active_s: float,
    drain_s: float,
    activate_deadline_s: float,
    log_level: str,
    log_format: str,
) -> None:
    """Decide which model is where, and have the workers do it."""
    instance = instance_id("scheduler")
    configure_logging("global_scheduler", log_level, log_format, scheduler=instance)

    async def serve(stop: asyncio.Event) -> None:
        specs = read_placement_file(placement) if placement is not None else []
        if prune and placement is None:
            raise PrismError(ErrorCode.INVALID_REQUEST, "--prune needs a --placement file")
        patience = {} if patience_s is None else {"patience_s": patience_s}
        name = policy_in(mode, policy, DEFAULT_POLICY)
        async with (
            connect_bus(nats_url, name=instance) as bus,
            run_global_scheduler(
                bus,
                instance,
                policy_named(
                    name,
                    min_active_s=min_active_s,
                    drain_s=drain_s,
                    shares_kv=keeps_homes(mode) and not keeps_kv_quotas(mode),
                    **patience,
                ),
                policy_name=name,
                specs=specs,
                prune=prune,
                deadlines=Deadlines(activate_s=activate_deadline_s, drain_s=drain_s),
            ),
        ):
            log.info("%s ready: policy %s, %d models in the placement file", instance, name, len(specs))
            await stop.wait()

    sys.exit(run_service("global_scheduler", serve))


if __name__ == "__main__":
    main()
