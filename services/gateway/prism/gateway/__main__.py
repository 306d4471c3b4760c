"""`python -m prism.gateway`."""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import click

from prism.common.bus import connect_bus
from prism.common.identity import instance_id
from prism.common.process import exit_with, run_service
from prism.common.telemetry import LOG_FORMATS, LOG_LEVELS, configure_logging
from prism.gateway.service import running_gateway
from prism.gateway.settings import Settings

DEFAULTS = Settings()


def option(flag: str, default: float, text: str, low: float = 0) -> Callable[[Any], Any]:
    """A limit's option, with its environment variable PRISM_GATEWAY_<FLAG>."""
    whole = isinstance(default, int)
    return click.option(
        f"--{flag}",
        type=click.IntRange(min=int(low)) if whole else click.FloatRange(min=low),
        default=default,
        envvar=f"PRISM_GATEWAY_{flag.replace('-', '_').upper()}",
        show_envvar=True,
        show_default=True,
        help=text,
    )


@click.command()
@click.option("--host", default="127.0.0.1", envvar="PRISM_GATEWAY_HOST", show_envvar=True, show_default=True)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    envvar="PRISM_GATEWAY_PORT",
    show_envvar=True,
    show_default=True,
    help="0: any free one.",
)
@click.option(
    "--nats",
    default="nats://127.0.0.1:4222",
    envvar="PRISM_NATS_URL",
    show_envvar=True,
    show_default=True,
    help="The bus.",
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
@option("max-body-bytes", DEFAULTS.max_body_bytes, "Largest request body.", 1)
@option("deadline-s", DEFAULTS.deadline_s, "Longest time for a whole request.", 0.001)
@option("park-s", DEFAULTS.park_s, "Longest wait for a model to wake.")
@option("park-per-model", DEFAULTS.park_per_model, "New requests that may wait for one model.")
@option("park-total", DEFAULTS.park_total, "New requests that may wait in all.")
@option("accept-s", DEFAULTS.accept_s, "Longest wait for a worker's word that it has a request.", 0.001)
@option("stall-s", DEFAULTS.stall_s, "Silence of a worker within a stream before it is left.", 0.001)
@option("silence-s", DEFAULTS.silence_s, "Age of a load report from which on its worker is gone.", 0.001)
@option("max-losses", DEFAULTS.max_losses, "Losses of its worker in a row that a request survives.")
@option("max-choices", DEFAULTS.max_choices, "Generations in one request (prompts times n).", 1)
@option("drain-s", DEFAULTS.drain_s, "Time for requests in progress to finish after SIGTERM.")
def main(host: str, port: int, nats: str, log_level: str, log_format: str, **limits: float) -> None:
    """OpenAI-compatible HTTP in front of the bus."""
    name = instance_id("gateway")
    configure_logging("gateway", log_level, log_format, gateway=name)
    settings = Settings(**limits)  # type: ignore[arg-type]  # click has made each of its field's type

    async def serve(stop: asyncio.Event) -> None:
        async with (
            connect_bus(nats, name=name) as bus,
            running_gateway(bus, host, port, settings, name) as gateway,
        ):
            # What is there by now stays: no need to look through it again with every collection.
            gc.freeze()
            print(f"gateway ready at {gateway.url}", flush=True)
            await stop.wait()
            await gateway.drain(settings.drain_s)

    exit_with(run_service("gateway", serve))


if __name__ == "__main__":
    main()
