"""`python -m tests.compose`: the stack of deploy/compose on a Docker engine, from its builds to its end.

Where no engine can be had that is said in one line, `compose: skipped, WHY`, and the exit status is 0. What
is kept from one run to the next (the engine's images and layers, the base image) is in build/compose, or in
the folder that PRISM_COMPOSE_CACHE names.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tests.compose.base_image import base_image
from tests.compose.checks import Unexpected
from tests.compose.debian_packages import NotInstallable
from tests.compose.docker_engine import Engine, NoEngine, docker_engine
from tests.compose.host_network import read_host_network
from tests.compose.image_contents import left_in_images
from tests.compose.images import build_images, prune_cache
from tests.compose.leftovers import left_in_engine, left_in_system
from tests.compose.package_configuration import read_package_configuration
from tests.compose.rehearsal import Rehearsal, rehearse
from tests.compose.results import Run, store
from tests.compose.shell import CommandFailed, Shell, own_environment
from tests.compose.stack import NotThere, Stack, settings_file

from prism.cli.tiny_models import make_tiny_models

ROOT = Path(__file__).parents[2]
CACHE_VARIABLE = "PRISM_COMPOSE_CACHE"
COMMANDS_LOG = ROOT / "build" / "compose-commands.log"
SERVICES_LOG = ROOT / "build" / "compose-services.log"


async def rehearse_stack(engine: Engine, cache: Path, services_log: TextIO) -> tuple[Rehearsal, list[str]]:
    """What the stack has shown, and what is left of it in the engine once it is down."""
    models = make_tiny_models(ROOT / "build" / "tiny-models", report=lambda line: None)
    with settings_file(cache) as (settings, nats_url):
        stack = Stack(engine, ROOT / "deploy" / "compose", settings, nats_url, services_log)
        # An earlier run may have been killed, and the engine has taken up again what it had.
        await stack.down()
        try:
            seen = await rehearse(stack, models, lambda line: print(f"   {line}", flush=True))
        finally:
            with suppress(CommandFailed):
                await stack.write_logs("at the end")
            await stack.down()
    return seen, await left_in_engine(engine)


async def run(cache: Path, transcript: TextIO, services_log: TextIO) -> bool:
    """The whole test; whether all was as it should be. Raises NoEngine, and what its steps raise."""
    began = time.monotonic()
    shell = Shell(transcript, own_environment())
    before = await read_host_network(shell)
    async with docker_engine(shell, cache / "docker") as engine:
        how = f"ready in {engine.ready_s:.1f} s" if engine.own else "was running"
        print(f"== Docker engine {engine.version}, {how}; {' '.join(engine.compose)}", flush=True)
        base = await base_image(engine, cache)
        print(f"== images on {base.name} ({base.how}, {base.seconds:.1f} s)", flush=True)
        packages = await read_package_configuration(shell)
        images = await build_images(engine, base, packages, ROOT)
        kept = await left_in_images(engine, images, base, packages)
        print("== the stack", flush=True)
        seen, left = await rehearse_stack(engine, cache, services_log)
        await prune_cache(engine)
    if engine.own:
        left += await left_in_system(shell, before, cache / "docker")
    return store(Run(engine, base, images, seen, kept, left, time.monotonic() - began), ROOT)


async def run_until_told_to_end(cache: Path, transcript: TextIO, services_log: TextIO) -> bool:
    """As `run`; SIGTERM ends it as Ctrl-C does, with everything put back."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(cache, transcript, services_log)


def main() -> int:
    """Parse the command line and run. Returns the exit status."""
    parser = argparse.ArgumentParser(description="The stack of deploy/compose on a Docker engine")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get(CACHE_VARIABLE) or ROOT / "build" / "compose"),
        help=f"what is kept between runs (default: {CACHE_VARIABLE}, else build/compose)",
    )
    options = parser.parse_args()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    COMMANDS_LOG.parent.mkdir(exist_ok=True)
    with COMMANDS_LOG.open("w", buffering=1) as transcript, SERVICES_LOG.open("w") as services_log:
        try:
            return 0 if asyncio.run(run_until_told_to_end(cache, transcript, services_log)) else 1
        except NoEngine as error:
            print(f"compose: skipped, {error}")
            return 0
        except (CommandFailed, NotInstallable, NotThere, Unexpected) as error:
            print(f"compose: failed, {error}\n   more in {COMMANDS_LOG} and {SERVICES_LOG}")
            return 1
        except (asyncio.CancelledError, KeyboardInterrupt):
            print("compose: ended before it was done")
            return 130


if __name__ == "__main__":
    sys.exit(main())
