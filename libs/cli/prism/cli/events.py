"""`prism events`: what happens in a running system, as it happens."""

import asyncio
import contextlib
import time

import click
from nats.aio.msg import Msg

from prism.cli.bus_option import json_option, nats_option, run_to_exit
from prism.cli.system_view import inspected_bus
from prism.cli.table import megabytes
from prism.common import subjects
from prism.common.messages.codec import decode, encode
from prism.common.messages.events import Event


def event_line(event: Event) -> str:
    """One event for people: what, of which model, on which worker, told by whom."""
    parts = [f"{event.kind:<10}"]
    parts += [event.model] if event.model else []
    parts += [f"on {event.worker}"] if event.worker and event.worker != event.source else []
    parts += [f"({event.source})"]
    parts += [event.detail] if event.detail else []
    parts += [f"{name} {megabytes(count)}" for name, count in event.bytes.items()]
    parts += [f"{phase} {took:.3f} s" for phase, took in event.seconds.items()]
    return " ".join(parts)


async def follow_events(
    nats_url: str, model: str | None, count: int | None, for_s: float | None, as_json: bool
) -> int:
    """Print events until `count` were, `for_s` seconds are over, or it is cancelled."""
    enough = asyncio.Event()
    printed = 0

    async def show(message: Msg) -> None:
        nonlocal printed
        event = decode(message.data, Event)
        if enough.is_set() or (model is not None and event.model != model):
            return
        clock = time.strftime("%H:%M:%S")
        try:
            click.echo(encode(event).decode() if as_json else f"{clock} {event_line(event)}")
        except OSError:
            # Nobody reads on (`| head`).
            enough.set()
            return
        printed += 1
        if count is not None and printed >= count:
            enough.set()

    async with inspected_bus(nats_url) as bus:
        subscription = await bus.subscribe(subjects.events(), show, inline=True)
        await bus.flush()
        click.echo(f"listening on {subjects.events()}", err=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                await enough.wait()
        await subscription.unsubscribe()
    return 0


@click.command("events")
@nats_option
@json_option
@click.option("--model", help="Only events of this model.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@click.option("--for-s", type=click.FloatRange(min=0, min_open=True), help="End after so many seconds.")
def events_command(
    nats_url: str, as_json: bool, model: str | None, count: int | None, for_s: float | None
) -> None:
    """Print what happens in a running system, until Ctrl-C: models that stage, start, sleep, wake and
    fail, services that come and go, who leads."""
    run_to_exit(follow_events(nats_url, model, count, for_s, as_json))
