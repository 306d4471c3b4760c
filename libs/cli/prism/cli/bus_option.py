"""What every command that talks to a running system has in common: where its bus is, and how it ends."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import click

from prism.common.errors import PrismError

nats_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--nats",
    "nats_url",
    default="nats://127.0.0.1:4222",
    envvar="PRISM_NATS_URL",
    show_envvar=True,
    show_default=True,
    help="The bus of the running system.",
)

json_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--json", "as_json", is_flag=True, help="For programs: one JSON object a line."
)


def run_to_exit(work: Coroutine[Any, Any, int]) -> None:
    """Run `work` and exit with the status that it returns; with 1 and the reason on PrismError."""
    try:
        status = asyncio.run(work)
    except PrismError as error:
        click.echo(f"prism: {error.message}", err=True)
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
