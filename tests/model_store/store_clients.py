"""What tests ask of a store that runs, as engines do."""

import asyncio
import os
from pathlib import Path

from tests.model_store.conftest import Running, engine_manifest, eventually

from prism.common.memfd import memfd_of
from prism.common.messages.store import ImageKind, LeaseRequest
from prism.common.store_client import Lease, deposit, lease

LAYOUT = "test-engine 1"
DEADLINE_S = 20.0


async def borrow(running: Running, model: str, folder: Path, layout: str = "", version: str = "") -> Lease:
    request = LeaseRequest(model, str(folder), layout, version)
    return await asyncio.to_thread(lease, running.socket, request, DEADLINE_S)


async def give(running: Running, model: str, fingerprint: str, content: bytes, room: str = "") -> str:
    fd = memfd_of("engine-image", content)
    try:
        manifest = engine_manifest(fingerprint, len(content))
        return await asyncio.to_thread(deposit, running.socket, model, manifest, fd, DEADLINE_S, room)
    finally:
        os.close(fd)


async def give_one_of(running: Running, folder: Path, content: bytes) -> tuple[str, str]:
    """Deposit an engine's image of the model in `folder`; its fingerprint and its hash."""
    with await borrow(running, "m", folder) as checkpoint:
        fingerprint = checkpoint.manifest.fingerprint
    return fingerprint, await give(running, "m", fingerprint, content)


async def until_unleased(running: Running) -> None:
    """Wait until the store has noticed that all leases ended."""
    await eventually(lambda: not any(image.leases for image in running.store.report().images))


async def until_written(running: Running) -> None:
    """Wait until all that is in memory in an engine's layout is on disk too."""
    await eventually(
        lambda: all(i.on_disk for i in running.store.report().images if i.kind is ImageKind.ENGINE)
    )
