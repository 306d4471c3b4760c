"""Which version of a model is registered when its files change, or are others on another node."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.model_store.model_folders import write_model
from tests.model_store.test_service import register, store_process, until_ready

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.codec import decode
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.messages.store import LeaseRequest, StoreInspection, StoreModelRequest
from prism.common.mirror import mirror_bucket
from prism.common.store_client import lease
from prism.common.tasks import end_task
from prism.model_store import inspection
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.fingerprint import identity_of
from prism.model_store.inspection import Inspector
from prism.model_store.store import ModelStore

DEADLINE_S = 30.0


def version_of(folder: Path) -> str:
    return identity_of(read_checkpoint(folder)).version


async def look(bus: Bus, node: str) -> ModelFacts:
    """What is registered once the store of `node` has looked at the folder."""
    answer = await bus.request(
        subjects.store(node, "inspect"), StoreModelRequest("m"), StoreInspection, timeout_s=DEADLINE_S
    )
    assert answer.facts is not None
    return answer.facts


async def registered(bus: Bus) -> ModelFacts:
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    entry = await bucket.get(subjects.facts_key("m"))
    return decode(entry.value or b"", ModelFacts)


class Nodes:
    """Two nodes that see the model in a folder of their own, under the same path."""

    def __init__(self, server: NatsServer, bus: Bus, directory: Path) -> None:
        self._server = server
        self._bus = bus
        self._directory = directory

    def folder(self, node: str) -> Path:
        """The model's, on that node."""
        return self._directory / node / "m"

    @contextlib.asynccontextmanager
    async def store(self, node: str) -> AsyncIterator[None]:
        """A store on that node, until the block ends."""
        # It runs there, so that one path leads to folders of two nodes.
        with store_process(self._server, self._directory / node, node=node) as process:
            await until_ready(self._bus, node)
            yield
            process.terminate()
            await asyncio.to_thread(process.wait, DEADLINE_S)


@pytest.fixture
async def nodes(fresh_nats: NatsServer, bus: Bus, tmp_path: Path) -> Nodes:
    for seed, node in enumerate(("one", "two")):
        write_model(tmp_path / node / "m", seed=seed)
    await register(bus, ModelSpec("m", "m"))
    return Nodes(fresh_nats, bus, tmp_path)


async def test_what_one_node_found_stands_while_its_store_still_finds_it(nodes: Nodes, bus: Bus) -> None:
    first = version_of(nodes.folder("one"))
    async with nodes.store("one"):
        assert (await look(bus, "one")).version == first
        async with nodes.store("two"):
            seen = await look(bus, "two")
            assert (seen.version, seen.node) == (first, "one"), "it was here all along, and elsewhere before"
            assert await registered(bus) == await look(bus, "one")
        async with nodes.store("two"):
            assert (await look(bus, "two")).version == first, "a store that starts has seen nothing change"


async def test_what_a_store_found_that_is_gone_is_replaced_but_not_at_once(nodes: Nodes, bus: Bus) -> None:
    async with nodes.store("one"):
        first = await look(bus, "one")
    async with nodes.store("two"):
        assert await look(bus, "two") == first, "it may be back in a moment"
        async with asyncio.timeout(DEADLINE_S):
            while (seen := await look(bus, "two")).node != "two":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert seen.version == version_of(nodes.folder("two"))


async def test_a_bus_that_lost_what_was_registered_has_it_back_from_any_store(nodes: Nodes, bus: Bus) -> None:
    async with nodes.store("one"), nodes.store("two"):
        first = await look(bus, "one")
        assert await look(bus, "two") == first
        bucket = await bus.bucket(subjects.BUCKET_MODELS)
        await bucket.delete(subjects.facts_key("m"))
        assert await look(bus, "two") == first
        assert await registered(bus) == first


async def test_a_folder_that_cannot_be_read_leaves_the_model_to_nodes_that_can(
    nodes: Nodes, bus: Bus
) -> None:
    nodes.folder("two").rename(nodes.folder("two").with_name("other"))
    write_model(nodes.folder("two"), seed=0)
    async with nodes.store("one"), nodes.store("two"):
        first = await look(bus, "one")
        assert await look(bus, "two") == first
        nodes.folder("one").rename(nodes.folder("one").with_name("away"))
        await look(bus, "one")
        async with asyncio.timeout(DEADLINE_S):
            while (await registered(bus)).node != "two":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await registered(bus)).version == first.version


async def test_an_engine_that_is_refused_another_version_has_the_folder_looked_at(
    nodes: Nodes, bus: Bus
) -> None:
    async with nodes.store("one"):
        first = await look(bus, "one")
        nodes.folder("one").rename(nodes.folder("one").with_name("before"))
        second = version_of(write_model(nodes.folder("one"), seed=3))
        request = LeaseRequest("m", "m", version=first.version)
        with pytest.raises(PrismError, match="another version"):
            await asyncio.to_thread(lease, nodes.folder("one").with_name("store.sock"), request, DEADLINE_S)
        async with asyncio.timeout(inspection.RECHECK_S / 2):
            while (await registered(bus)).version != second:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_folder_that_changes_is_registered_though_others_find_what_was_there(
    nodes: Nodes, bus: Bus
) -> None:
    async with nodes.store("one"), nodes.store("two"):
        await look(bus, "one")
        assert (await look(bus, "two")).node == "one"
        nodes.folder("two").rename(nodes.folder("two").with_name("before"))
        third = version_of(write_model(nodes.folder("two"), seed=3))
        assert (await look(bus, "two")).version == third
        assert (await look(bus, "one")).version == third, "the other one's is no longer what is registered"


async def test_files_that_changed_while_no_store_ran_are_registered(nodes: Nodes, bus: Bus) -> None:
    async with nodes.store("one"):
        before = await look(bus, "one")
    nodes.folder("one").rename(nodes.folder("one").with_name("before"))
    write_model(nodes.folder("one"), seed=3)
    async with nodes.store("one"):
        assert (await look(bus, "one")).version not in ("", before.version)


async def test_one_that_is_asked_for_all_the_time_keeps_no_other_from_being_looked_at(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "RECHECK_S", 0.3)
    folder = write_model(tmp_path / "m", seed=1)
    await register(bus, ModelSpec("m", str(folder)), ModelSpec("other", str(write_model(tmp_path / "o"))))
    looked = asyncio.Event()
    store = ModelStore(
        node="here", source="store-test", image_dir=tmp_path / "images", budget_bytes=10**9,
        disk_bytes=None, threads=1, tell=lambda event: None,
    )  # fmt: skip
    inspector = Inspector(bus, store)
    facts = mirror_bucket(
        bus, subjects.BUCKET_MODELS, ModelFacts, pattern="facts.*", on_change=lambda *_: looked.set()
    )
    specs = mirror_bucket(
        bus, subjects.BUCKET_MODELS, ModelSpec, pattern="spec.*", on_change=inspector.on_change
    )
    async with store, facts as found, specs as registered_specs, asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(inspector.run(registered_specs))
        try:
            while subjects.facts_key("m") not in found.values:
                looked.clear()
                await looked.wait()
            folder.rename(tmp_path / "before")
            after = version_of(write_model(folder, seed=2))
            while found.values[subjects.facts_key("m")].version != after:
                inspector.look_again("other")
                inspector.look_again("nobody")
                await asyncio.sleep(0.01)
        finally:
            await end_task(running)
