"""A model store in the test's own process: real files, real memfds, a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prism.common.messages.events import Event
from prism.common.messages.store import ImageKind, ImageManifest, TensorEntry
from prism.model_store.socket_server import serve_socket
from prism.model_store.store import ModelStore


@dataclass
class Running:
    """A store that serves a socket, and what it told."""

    store: ModelStore
    socket: Path
    events: list[Event] = field(default_factory=list)

    def told(self, kind: str) -> list[str]:
        """Models that an event of `kind` was about."""
        return [event.model for event in self.events if event.kind == kind]


StartStore = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def start_store(tmp_path: Path) -> StartStore:
    """Run a store on the test's own folder and socket; again for one that comes after it."""

    @contextlib.asynccontextmanager
    async def start(budget_bytes: int = 10**9, disk_bytes: int | None = None) -> AsyncIterator[Running]:
        events: list[Event] = []
        store = ModelStore(
            node="here",
            source="store-test",
            image_dir=tmp_path / "images",
            budget_bytes=budget_bytes,
            disk_bytes=disk_bytes,
            threads=3,
            tell=events.append,
        )
        path = tmp_path / "store.sock"
        async with store, serve_socket(store, path):
            yield Running(store, path, events)

    return start


@pytest.fixture
async def running(start_store: StartStore) -> AsyncIterator[Running]:
    """One store with plenty of room."""
    async with start_store() as started:
        yield started


async def eventually(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Wait until `condition` holds, for what tells nobody when it does."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def engine_manifest(fingerprint: str, nbytes: int, layout: str = "test-engine 1") -> ImageManifest:
    """The manifest of an engine image that is one tensor."""
    return ImageManifest(
        fingerprint=fingerprint,
        kind=ImageKind.ENGINE,
        nbytes=nbytes,
        tensors=[TensorEntry("fused", 0, nbytes, "uint8", (nbytes,))],
        layout=layout,
    )
