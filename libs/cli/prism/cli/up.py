"""`prism up`: the whole system in the foreground of one terminal."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import click

from prism.cli.preflight import check_before_start
from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.common.errors import PrismError
from prism.common.modes import DEFAULT_MODE, MODES, policy_in
from prism.common.placement_file import read_placement_file
from prism.common.telemetry import LOG_FORMATS, LOG_LEVELS
from prism.scheduling.placement import DEFAULT_POLICY, policies

COLOURS = {"gateway": 36, "global_scheduler": 33, "gpu_worker": 32, "model_store": 35}
NAME_WIDTH = 18
NATS_PORT = 4222
COUNT = click.IntRange(min=1)
GB = click.FloatRange(min=0, min_open=True)


def tell(text: str, *, err: bool = False) -> None:
    """Print a line. Whoever read what it prints may have gone (`| head`); the system goes on without."""
    with contextlib.suppress(OSError):
        click.echo(text, err=err)


def print_service_line(service: str, line: str) -> None:
    """One log line of a service, its name in front."""
    name = f"{service:<{NAME_WIDTH}}"
    if sys.stderr.isatty():
        name = f"\x1b[{COLOURS.get(service.partition('-')[0], 37)}m{name}\x1b[0m"
    tell(f"{name} | {line}", err=True)


def curl_line(gateway_url: str, model: str) -> str:
    """A shell command that chats with `model`."""
    body = {
        "model": model,
        "stream": True,
        "max_tokens": 32,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    header = "content-type: application/json"
    return f"curl -N {gateway_url}/v1/chat/completions -H '{header}' -d '{json.dumps(body)}'"


async def run_until_stopped(settings: SystemSettings) -> int:
    """Run the system until SIGINT or SIGTERM, or until it cannot run. Returns the exit status.

    Raises PrismError where it does not come up, before anything is started if that can be told.
    """
    models = read_placement_file(settings.placement)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    starting = asyncio.current_task()
    assert starting is not None
    running: list[RunningSystem] = []

    def on_signal() -> None:
        if stop.is_set():
            if running:
                running[0].kill()
            # What is left dies with this process.
            os._exit(130)
        stop.set()
        drains = ": requests in flight may finish (again to end at once)" if running else ""
        tell(f"stopping{drains}", err=True)
        if not running:
            starting.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal)
    try:
        await check_before_start(settings)
        async with running_system(settings, print_service_line) as system:
            running.append(system)
            for url in system.gateway_urls.values():
                tell(f"gateway ready at {url}")
            tell(f"nats at {system.nats_url}")
            if models:
                tell(curl_line(system.gateway_url, models[0].model_name))
            failure = asyncio.create_task(system.first_failure(), name="first failure")
            stopped = asyncio.create_task(stop.wait(), name="stop")
            done, pending = await asyncio.wait({failure, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            if failure in done:
                tell(failure.result(), err=True)
                return 1
    except asyncio.CancelledError as cancelled:
        if not stop.is_set():
            raise
        if isinstance(cancelled.__context__, PrismError):
            # Interrupted while what had failed was being cleared up.
            raise cancelled.__context__ from None
    tell("stopped", err=True)
    return 0


def _is_free(port: int) -> bool:
    """Whether this process could listen on the loopback's `port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@click.command("up")
@click.argument("placement", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--nats", "nats_url", envvar="PRISM_NATS_URL", show_envvar=True, help="An existing NATS server."
)
@click.option(
    "--nats-port",
    type=click.IntRange(0, 65535),
    help=f"Port of the NATS server that it starts. [default: {NATS_PORT}; any free one where that is taken]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the gateway.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port of the gateway; 0 lets the kernel choose.",
)
@click.option(
    "--worker-memory-gb",
    type=GB,
    envvar="PRISM_WORKER_MEMORY_GB",
    show_envvar=True,
    help="What weights and KV caches of a worker may take.  "
    "[default: 4; cuda: the GPU's memory less 4 GiB for activations]",
)
@click.option(
    "--store-memory-gb",
    type=GB,
    envvar="PRISM_STORE_MEMORY_GB",
    show_envvar=True,
    help="What staged models may take of host memory, in each store.  [default: half of it, in each]",
)
@click.option(
    "--image-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="PRISM_IMAGE_DIR",
    show_envvar=True,
    help="Where engine images are kept on disk.  [default: ~/.cache/prism/images]",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    envvar="PRISM_MODE",
    show_envvar=True,
    default=DEFAULT_MODE,
    show_default=True,
    help="static, elastic: models stay at home, awake; static: with the KV cache that they began with.",
)
@click.option(
    "--policy",
    type=click.Choice(sorted(policies)),
    envvar="PRISM_PLACEMENT_POLICY",
    show_envvar=True,
    help=f"Placement policy of --mode full.  [default: {DEFAULT_POLICY}]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "simulated"]),
    envvar="PRISM_DEVICE",
    show_envvar=True,
    default="cpu",
    show_default=True,
    help="What the engines run on. simulated: nothing; they say numbers.",
)
@click.option("--gateways", type=COUNT, default=1, show_default=True, help="Processes of the gateway.")
@click.option("--schedulers", type=COUNT, default=1, show_default=True, help="Schedulers: one leads.")
@click.option("--workers", type=COUNT, default=1, show_default=True, help="Workers: a GPU each.")
@click.option("--stores", type=COUNT, default=1, show_default=True, help="Model stores.")
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS, case_sensitive=False), default="INFO", show_default=True
)
@click.option("--log-format", type=click.Choice(LOG_FORMATS), default="text", show_default=True)
def up_command(placement: Path, nats_port: int | None, **options: object) -> None:
    """Run the whole system for the models of PLACEMENT (a placement file) until Ctrl-C."""
    logging.basicConfig(level="WARNING")
    if nats_port is None:
        nats_port = NATS_PORT if _is_free(NATS_PORT) else 0
    settings = SystemSettings(placement=placement, nats_port=nats_port, **options)  # type: ignore[arg-type]
    if settings.device == "cuda" and settings.workers > 1 and os.environ.get("PRISM_GPU"):
        raise click.UsageError(
            f"PRISM_GPU is for one worker; with --workers {settings.workers} worker i uses GPU i - 1: "
            "unset it"
        )
    try:
        policy_in(settings.mode, settings.policy, DEFAULT_POLICY)
        status = asyncio.run(run_until_stopped(settings))
    except PrismError as error:
        click.echo(f"prism: {error.message}", err=True)
        status = 1
    sys.exit(status)
