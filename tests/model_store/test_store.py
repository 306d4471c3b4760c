"""The store as its clients see it: leases, deposits, eviction, over a real socket."""

import asyncio
import errno
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.model_store.conftest import Running, StartStore, engine_manifest, eventually
from tests.model_store.model_folders import big_model, tensor_bytes, write_model
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
from prism.common.memfd import create_memfd, read_memfd
from prism.common.messages.codec import encode
from prism.common.messages.store import ImageKind, LeaseRequest
from prism.common.store_client import deposit, lease, wait_readable
from prism.model_store import store
from prism.model_store.content_hash import hash_of_image
from prism.model_store.staging import ImagePlan, ReadProgress, read_image

pytestmark = pytest.mark.core


async def test_a_lease_brings_the_bytes_of_the_files(running: Running, tmp_path: Path) -> None:
    with await borrow(running, "m", write_model(tmp_path / "m")) as lent:
        assert lent.kind is ImageKind.CHECKPOINT
        assert lent.seconds > 0
        content = read_memfd(lent.fd, lent.nbytes)
        for tensor in lent.manifest.tensors:
            expected = tensor_bytes(tensor.name, tensor.nbytes)
            assert content[tensor.offset : tensor.offset + tensor.nbytes] == expected
        assert lent.manifest.content_hash == hash_of_image(memoryview(content))
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(lent.fd, 1)


async def test_a_second_lease_finds_the_image_there(running: Running, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    with await borrow(running, "m", folder) as first, await borrow(running, "m", folder) as second:
        assert second.seconds == 0
        assert os.fstat(first.fd).st_ino == os.fstat(second.fd).st_ino
        assert [image.leases for image in running.store.report().images] == [2]
    await until_unleased(running)
    assert running.told("staged") == ["m"]


async def test_many_who_ask_at_once_are_served_by_one_staging_and_all_see_progress(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_wait = threading.Event()

    def read_once_all_wait(*reading: Any) -> str:
        assert all_wait.wait(DEADLINE_S)
        return read_image(*reading)

    monkeypatch.setattr(store, "read_image", read_once_all_wait)
    folder = big_model(tmp_path / "m", 20)
    progress: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    asked = asyncio.gather(
        *(
            asyncio.to_thread(
                lease,
                running.socket,
                LeaseRequest("m", str(folder)),
                DEADLINE_S,
                lambda done, total, seen=seen: seen.append((done, total)),  # type: ignore[misc]
            )
            for seen in progress
        )
    )
    await eventually(lambda: all(progress))
    all_wait.set()
    leases = await asked
    assert len({os.fstat(lent.fd).st_ino for lent in leases}) == 1
    assert running.told("staged") == ["m"]
    for seen in progress:
        assert seen[-1] == (20_000_000, 20_000_000)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for lent in leases:
        lent.close()


async def test_equal_content_is_held_once(running: Running, tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
    with await borrow(running, "one", one) as first, await borrow(running, "two", two) as second:
        assert os.fstat(first.fd).st_ino == os.fstat(second.fd).st_ino
        assert first.manifest.fingerprint != second.manifest.fingerprint
        (image,) = running.store.report().images
        assert image.models == ["one", "two"]
        assert running.store.report().used_bytes == first.nbytes


async def test_an_engine_image_is_preferred_by_who_can_use_it(running: Running, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    content = os.urandom(50_000)
    _, content_hash = await give_one_of(running, folder, content)
    assert content_hash == hash_of_image(memoryview(content))
    with await borrow(running, "m", folder, LAYOUT) as lent:
        assert (lent.kind, lent.manifest.layout, lent.seconds) == (ImageKind.ENGINE, LAYOUT, 0)
        assert read_memfd(lent.fd, lent.nbytes) == content
    with await borrow(running, "m", folder, "another engine") as lent:
        assert lent.kind is ImageKind.CHECKPOINT


async def test_an_engine_image_outlives_the_store(start_store: StartStore, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    content = os.urandom(3_000_000)
    async with start_store() as first:
        # No waiting here: the end of a store finishes what is being written.
        await give_one_of(first, folder, content)
    async with start_store() as second:
        with await borrow(second, "m", folder, LAYOUT) as lent:
            assert lent.kind is ImageKind.ENGINE
            assert lent.seconds > 0
            assert read_memfd(lent.fd, lent.nbytes) == content
        assert [image.on_disk for image in second.store.report().images] == [True]


async def test_an_image_that_another_version_has_hashed_otherwise_is_left_to_it_until_it_is_made_anew(
    start_store: StartStore, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    content = os.urandom(3_000_000)
    async with start_store() as first:
        fingerprint, _ = await give_one_of(first, folder, content)
    (manifest,) = (tmp_path / "images").rglob("manifest.json")
    ours = manifest.read_bytes()
    manifest.write_bytes(ours.replace(b"xxh3-8m:", b""))
    async with start_store() as second:
        with await borrow(second, "m", folder, LAYOUT) as lent:
            assert lent.kind is ImageKind.CHECKPOINT
        assert manifest.exists()
        await give(second, "m", fingerprint, content)
        await until_written(second)
        assert manifest.read_bytes() == ours


async def test_a_corrupt_image_on_disk_is_deleted_and_the_checkpoint_lent(
    start_store: StartStore, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    async with start_store() as first:
        await give_one_of(first, folder, os.urandom(100_000))
    (on_disk,) = (tmp_path / "images").glob("*/*/image.bin")
    damaged = bytearray(on_disk.read_bytes())
    damaged[50_000] ^= 1
    on_disk.write_bytes(damaged)
    async with start_store() as second:
        with await borrow(second, "m", folder, LAYOUT) as lent:
            assert lent.kind is ImageKind.CHECKPOINT
        assert not on_disk.exists()
        assert any("corrupt" in event.detail for event in second.events)


async def test_an_image_on_disk_that_can_not_be_read_now_stays_and_the_checkpoint_is_lent(
    start_store: StartStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "m")
    async with start_store() as first:
        await give_one_of(first, folder, os.urandom(100_000))
    open_file = os.open

    def no_descriptor_for_the_image(path: Any, *how: Any, **options: Any) -> int:
        if Path(path).name == "image.bin":
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return open_file(path, *how, **options)

    async with start_store() as second:
        with monkeypatch.context() as short_of_descriptors:
            short_of_descriptors.setattr(os, "open", no_descriptor_for_the_image)
            with await borrow(second, "m", folder, LAYOUT) as lent:
                assert lent.kind is ImageKind.CHECKPOINT
        with await borrow(second, "m", folder, LAYOUT) as lent:
            assert lent.kind is ImageKind.ENGINE


async def test_what_a_killed_store_left_half_written_is_removed(
    start_store: StartStore, tmp_path: Path
) -> None:
    left_over = tmp_path / "images" / ("0" * 32) / ".writing-abc"
    left_over.mkdir(parents=True)
    async with start_store():
        assert not left_over.exists()


async def test_a_lease_protects_and_its_end_allows_eviction(start_store: StartStore, tmp_path: Path) -> None:
    one, two = big_model(tmp_path / "one", 6, seed=1), big_model(tmp_path / "two", 6, seed=2)
    async with start_store(budget_bytes=10_000_000) as running:
        lent = await borrow(running, "one", one)
        with pytest.raises(PrismError) as caught:
            await borrow(running, "two", two)
        assert caught.value.code is ErrorCode.OUT_OF_MEMORY
        assert caught.value.retry
        assert "leases hold 0.01 GB" in caught.value.message
        assert running.told("evicted") == []
        lent.close()
        await until_unleased(running)
        with await borrow(running, "two", two):
            assert running.told("evicted") == ["one"]
            assert running.store.report().used_bytes == 6_000_000


async def test_the_model_unused_for_longest_is_evicted(start_store: StartStore, tmp_path: Path) -> None:
    folders = {name: big_model(tmp_path / name, 3, seed) for seed, name in enumerate(["a", "b", "c"])}
    async with start_store(budget_bytes=8_000_000) as running:
        for name in ["a", "b", "a", "c"]:
            (await borrow(running, name, folders[name])).close()
            await until_unleased(running)
        assert running.told("evicted") == ["b"]


async def test_a_checkpoint_goes_first_once_its_engine_image_is_here(
    start_store: StartStore, tmp_path: Path
) -> None:
    old, new = big_model(tmp_path / "old", 3, 1), big_model(tmp_path / "new", 3, 2)
    other = big_model(tmp_path / "other", 3, 3)
    async with start_store(budget_bytes=10_000_000) as running:
        (await borrow(running, "old", old)).close()
        with await borrow(running, "new", new) as lent:
            await give(running, "new", lent.manifest.fingerprint, os.urandom(3_000_000))
        await until_unleased(running)
        await until_written(running)
        (await borrow(running, "other", other)).close()
        kinds = {(tuple(image.models), image.kind) for image in running.store.report().images}
        assert kinds == {
            (("old",), ImageKind.CHECKPOINT),
            (("new",), ImageKind.ENGINE),
            (("other",), ImageKind.CHECKPOINT),
        }


async def test_an_image_without_room_in_memory_is_kept_on_disk(
    start_store: StartStore, tmp_path: Path
) -> None:
    folder = big_model(tmp_path / "m", 6)
    content = os.urandom(6_000_000)
    async with start_store(budget_bytes=10_000_000) as running:
        with await borrow(running, "m", folder) as lent:
            await give(running, "m", lent.manifest.fingerprint, content)
            assert running.store.report().used_bytes == 6_000_000
        await until_unleased(running)
        with await borrow(running, "m", folder, LAYOUT) as lent:
            assert lent.kind is ImageKind.ENGINE
            assert read_memfd(lent.fd, lent.nbytes) == content


async def test_staging_that_nobody_waits_for_any_more_is_given_up(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_once_nobody_waits(plan: ImagePlan, fd: int, threads: int, progress: ReadProgress) -> str:
        assert progress.cancelled.wait(DEADLINE_S)
        return read_image(plan, fd, threads, progress)

    monkeypatch.setattr(store, "read_image", read_once_nobody_waits)
    folder = big_model(tmp_path / "m", 60)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.setblocking(False)
        asking.connect(str(running.socket))
        asking.send(encode(LeaseRequest("m", str(folder))))
        async with asyncio.timeout(10):
            await wait_readable(asking)
    await eventually(lambda: not running.store.report().used_bytes)
    assert running.told("staged") == []
    monkeypatch.undo()
    with await borrow(running, "m", folder) as lent:
        assert lent.nbytes == 60_000_000


async def test_a_broken_model_is_refused_and_leaves_nothing(running: Running, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(PrismError, match="it is cut off") as caught:
            await borrow(running, "m", folder)
        assert caught.value.code is ErrorCode.MODEL_FAILED
    assert running.store.report().used_bytes == 0
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)


async def test_a_changed_model_is_staged_anew(running: Running, tmp_path: Path) -> None:
    with await borrow(running, "m", write_model(tmp_path / "m", seed=1)) as before:
        (tmp_path / "m").rename(tmp_path / "old")
        with await borrow(running, "m", write_model(tmp_path / "m", seed=2)) as after:
            assert after.manifest.fingerprint != before.manifest.fingerprint
            assert read_memfd(after.fd, after.nbytes) != read_memfd(before.fd, before.nbytes)


async def test_deposits_that_can_not_be_used_are_refused(running: Running) -> None:
    fingerprint = "0" * 32
    for nbytes, manifest, what in [
        (5, engine_manifest(fingerprint, 10), "its memory holds 5 bytes"),
        (10, engine_manifest(fingerprint, 10, layout=""), "has a name"),
        (10, engine_manifest("../../../tmp/x", 10), "32 hex digits"),
    ]:
        fd = create_memfd("image", nbytes)
        with pytest.raises(PrismError, match=what):
            await asyncio.to_thread(deposit, running.socket, "m", manifest, fd, DEADLINE_S)
        os.close(fd)
    assert running.store.report().images == []


async def test_evict_frees_what_is_not_on_lease(running: Running, tmp_path: Path) -> None:
    lent = await borrow(running, "m", write_model(tmp_path / "m"))
    with pytest.raises(PrismError, match="on lease"):
        running.store.evict("m")
    lent.close()
    await until_unleased(running)
    assert running.store.evict("m") == lent.nbytes
    assert running.store.evict("m") == 0
    assert running.told("evicted") == ["m"]
    assert running.store.report().used_bytes == 0


async def test_evicting_one_of_two_who_share_keeps_the_image(running: Running, tmp_path: Path) -> None:
    (await borrow(running, "one", write_model(tmp_path / "one"))).close()
    (await borrow(running, "two", write_model(tmp_path / "two"))).close()
    await until_unleased(running)
    assert running.store.evict("one") == 0
    assert [image.models for image in running.store.report().images] == [["two"]]


async def test_prefetch_brings_the_engine_image_when_there_is_one(
    start_store: StartStore, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    async with start_store() as first:
        assert await first.store.prefetch("m", str(folder)) > 0
        (image,) = first.store.report().images
        assert (image.kind, image.leases) == (ImageKind.CHECKPOINT, 0)
        await give(first, "m", image.fingerprint, os.urandom(1000))
    async with start_store() as second:
        assert await second.store.prefetch("m", str(folder)) == 1000
        assert [image.kind for image in second.store.report().images] == [ImageKind.ENGINE]


async def test_weights_of_another_version_than_was_asked_for_are_not_lent(
    running: Running, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m", seed=1)
    version = (await running.store.identity(str(folder))).version
    (await borrow(running, "m", folder, version=version)).close()
    asked_for: list[str] = []
    running.store.on_other_version = asked_for.append
    folder.rename(tmp_path / "old")
    write_model(tmp_path / "m", seed=2)
    with pytest.raises(PrismError, match="on node here holds another version of m than") as caught:
        await borrow(running, "m", folder, version=version)
    assert (caught.value.code, caught.value.retry) == (ErrorCode.MODEL_FAILED, True)
    assert asked_for == ["m"], "somebody looks what is there now"
    (await borrow(running, "m", folder)).close()
