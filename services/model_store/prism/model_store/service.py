"""The model store as a service: the store, its socket, its endpoints and its inspector, in one life."""

import asyncio
import contextlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.messages.events import Event
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.mirror import mirror_bucket
from prism.common.tasks import end_task
from prism.model_store.endpoints import serve_endpoints
from prism.model_store.inspection import Inspector
from prism.model_store.socket_server import serve_socket
from prism.model_store.sole_store import sole_store
from prism.model_store.store import ModelStore

log = logging.getLogger(__name__)

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class StoreSettings:
    """How to run a store. `budget_bytes` bounds the images in memory, `disk_bytes` those on disk; `threads`
    read one image."""

    instance: str
    nats_url: str
    node: str
    socket_path: Path
    image_dir: Path
    budget_bytes: int
    disk_bytes: int
    threads: int


async def serve(settings: StoreSettings, stop: asyncio.Event) -> None:
    """Run a store until `stop` is set. Raises PrismError when the bus or the socket can't be had."""
    # Before anything else: who only stands by must not touch what the serving store has on disk.
    with sole_store(settings.socket_path):
        await _serve(settings, stop)


async def _serve(settings: StoreSettings, stop: asyncio.Event) -> None:
    instance = settings.instance
    async with connect_bus(settings.nats_url, name=instance) as bus, asyncio.TaskGroup() as background:
        store = ModelStore(
            node=settings.node,
            source=instance,
            image_dir=settings.image_dir,
            budget_bytes=settings.budget_bytes,
            disk_bytes=settings.disk_bytes,
            threads=settings.threads,
            tell=lambda event: _tell(background, bus, event),
        )
        inspector = Inspector(bus, store)
        store.on_other_version = inspector.look_again
        bus.on_return.append(inspector.bus_returned)
        async with (
            store,
            serve_socket(store, settings.socket_path),
            mirror_bucket(
                bus,
                subjects.BUCKET_MODELS,
                ModelSpec,
                pattern="spec.*",
                on_change=inspector.on_change,
            ) as specs,
            mirror_bucket(
                bus,
                subjects.BUCKET_MODELS,
                ModelFacts,
                pattern="facts.*",
                on_change=inspector.facts_changed,
            ),
            serve_endpoints(bus, store, inspector, specs.values, instance),
        ):
            inspecting = background.create_task(inspector.run(specs), name="inspector")
            log.info(
                "%s ready on %s: %.1f GB for images, which persist in %s, %.1f GB at most",
                instance,
                settings.socket_path,
                settings.budget_bytes / 1e9,
                settings.image_dir,
                settings.disk_bytes / 1e9,
            )
            await stop.wait()
            log.info("draining")
            await end_task(inspecting)


def _tell(tasks: asyncio.TaskGroup, bus: Bus, event: Event) -> None:
    tasks.create_task(bus.tell(event))


def default_budget_bytes() -> int:
    """Half of the memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        limit = "max"
    return (total if limit == "max" else min(total, int(limit))) // 2


def default_disk_bytes(image_dir: Path) -> int:
    """Half of the disk that `image_dir` is on, or will be."""
    for folder in (image_dir, *image_dir.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).total // 2
    raise AssertionError("the root of the file system is always there")
