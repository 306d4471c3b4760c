"""Room for an image before it is made, over a real socket."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.model_store.conftest import Running, StartStore, eventually
from tests.model_store.model_folders import big_model, write_model
from tests.model_store.store_clients import (
    DEADLINE_S,
    LAYOUT,
    borrow,
    give,
    give_one_of,
    until_unleased,
    until_written,
)

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.store import ImageKind, RoomRequest
from prism.common.store_client import room
from prism.model_store import rooms as module

pytestmark = pytest.mark.core


@contextlib.asynccontextmanager
async def kept_room(running: Running, fingerprint: str, nbytes: int) -> AsyncIterator[str]:
    wanted = RoomRequest("m", fingerprint, LAYOUT, nbytes)
    with contextlib.ExitStack() as stack:
        kept = room(running.socket, wanted, DEADLINE_S)
        yield await asyncio.to_thread(stack.enter_context, kept)


async def test_room_for_an_image_is_made_before_the_image_is(start_store: StartStore, tmp_path: Path) -> None:
    content = os.urandom(6_000_000)
    async with start_store(budget_bytes=10_000_000) as running:
        checkpoint = await borrow(running, "m", big_model(tmp_path / "m", 6))
        fingerprint = checkpoint.manifest.fingerprint
        # Just closed, as engines do: the store may learn of the end of the lease after it is asked for room.
        checkpoint.close()
        async with kept_room(running, fingerprint, len(content)) as granted:
            assert running.told("evicted") == ["m"]
            assert running.store.report().used_bytes == len(content)
            await give(running, "m", fingerprint, content, granted)
            assert running.store.report().used_bytes == len(content)
        (image,) = running.store.report().images
        assert image.kind is ImageKind.ENGINE


async def test_an_image_stays_while_whoever_brought_it_has_no_lease_of_it_yet(
    start_store: StartStore, tmp_path: Path
) -> None:
    content, other = os.urandom(6_000_000), big_model(tmp_path / "other", 6)
    async with start_store(budget_bytes=10_000_000) as running:
        with await borrow(running, "m", write_model(tmp_path / "m")) as checkpoint:
            fingerprint = checkpoint.manifest.fingerprint
        async with kept_room(running, fingerprint, len(content)) as granted:
            await give(running, "m", fingerprint, content, granted)
            await until_written(running)
            with pytest.raises(PrismError, match="leases hold"):
                await borrow(running, "other", other)
        await eventually(lambda: not any(image.users for image in running.store.table.images))
        with await borrow(running, "other", other):
            assert running.told("evicted")[-1] == "m"


async def test_the_checkpoint_makes_room_for_its_image_before_others_do(
    start_store: StartStore, tmp_path: Path
) -> None:
    async with start_store(budget_bytes=13_000_000) as running:
        (await borrow(running, "other", big_model(tmp_path / "other", 6, seed=2))).close()
        with await borrow(running, "m", big_model(tmp_path / "m", 6)) as checkpoint:
            fingerprint = checkpoint.manifest.fingerprint
        await until_unleased(running)
        async with kept_room(running, fingerprint, 6_000_000):
            assert running.told("evicted") == ["m"]


async def test_there_is_no_more_room_than_the_image_that_is_there_needs(
    start_store: StartStore, tmp_path: Path
) -> None:
    async with start_store(budget_bytes=10_000_000) as running:
        (await borrow(running, "other", big_model(tmp_path / "other", 6))).close()
        fingerprint, _ = await give_one_of(running, write_model(tmp_path / "m"), os.urandom(3_000_000))
        used = running.store.report().used_bytes
        async with kept_room(running, fingerprint, 3_000_000):
            assert running.store.report().used_bytes == used
    assert running.told("evicted") == []


async def test_room_is_waited_for_while_others_build_from_the_same_checkpoint(
    start_store: StartStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    async with start_store(budget_bytes=10_000_000) as running:
        checkpoint = await borrow(running, "m", big_model(tmp_path / "m", 6))

        async def ask() -> None:
            async with kept_room(running, checkpoint.manifest.fingerprint, 6_000_000):
                assert running.told("evicted") == ["m"]

        refused = asyncio.Event()
        reserve = running.store.table.reserve

        def reserving(*asked: Any, **options: Any) -> Any:
            refused.set()
            return reserve(*asked, **options)

        monkeypatch.setattr(running.store.table, "reserve", reserving)
        asking = asyncio.create_task(ask())
        await asyncio.wait_for(refused.wait(), DEADLINE_S)
        assert not asking.done()
        checkpoint.close()
        await asyncio.wait_for(asking, DEADLINE_S)


async def test_room_that_nothing_was_deposited_in_is_free_again(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        wanted = RoomRequest("m", "0" * 32, LAYOUT, 1_000_000)
        await asyncio.to_thread(stack.enter_context, room(running.socket, wanted, DEADLINE_S))
        assert running.store.report().used_bytes == 1_000_000
    await eventually(lambda: running.store.report().used_bytes == 0)


async def test_there_is_no_room_beside_what_is_on_lease(
    start_store: StartStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    async with start_store(budget_bytes=10_000_000) as running:
        with await borrow(running, "m", big_model(tmp_path / "m", 6)):
            kept = room(running.socket, RoomRequest("m", "0" * 32, LAYOUT, 6_000_000), DEADLINE_S)
            with pytest.raises(PrismError, match="leases hold") as caught:
                await asyncio.to_thread(kept.__enter__)
        assert caught.value.code is ErrorCode.OUT_OF_MEMORY
