"""Images on disk: whole or not at all, whoever else writes there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import msgspec
import pytest
from tests.model_store.conftest import engine_manifest

from prism.common.errors import PrismError
from prism.common.memfd import memfd_of
from prism.common.messages.store import ImageManifest
from prism.model_store import image_disk
from prism.model_store.content_hash import hash_of_image
from prism.model_store.image_disk import ImageDisk
from prism.model_store.images import ImageKey

pytestmark = pytest.mark.core

CONTENT = bytes(range(250)) * 4
FINGERPRINT = "0" * 32


def manifest_of(content: bytes, fingerprint: str = FINGERPRINT) -> ImageManifest:
    hashed = hash_of_image(memoryview(content))
    return msgspec.structs.replace(engine_manifest(fingerprint, len(content)), content_hash=hashed)


@contextmanager
def memory_of(content: bytes) -> Iterator[int]:
    fd = memfd_of("image", content)
    try:
        yield fd
    finally:
        os.close(fd)


def key_of(manifest: ImageManifest) -> ImageKey:
    return ImageKey(manifest.fingerprint, manifest.layout)


def images_below(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in root.rglob("image.bin")]


def test_an_image_is_found_again(tmp_path: Path) -> None:
    manifest = manifest_of(CONTENT)
    with memory_of(CONTENT) as fd:
        ImageDisk(tmp_path).write(manifest, fd)
    assert ImageDisk(tmp_path).find(key_of(manifest)) == manifest
    assert images_below(tmp_path) == [CONTENT]


def test_an_image_for_which_the_disk_has_no_room_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=999))
    with (
        memory_of(CONTENT) as fd,
        pytest.raises(PrismError, match=r"0.0 GB are free there; it stays in memory only"),
    ):
        ImageDisk(tmp_path).write(manifest_of(CONTENT), fd)
    assert images_below(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_an_image_that_can_not_be_read_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    manifest = manifest_of(CONTENT)
    with memory_of(CONTENT) as fd:
        ImageDisk(tmp_path).write(manifest, fd)

    def failing(path: Path) -> NoReturn:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", failing)
        assert ImageDisk(tmp_path).find(key_of(manifest)) is None
    assert ImageDisk(tmp_path).find(key_of(manifest)) == manifest


@pytest.mark.parametrize("damaged", [b"{", b"{}"])
def test_an_image_whose_manifest_says_nothing_is_deleted(tmp_path: Path, damaged: bytes) -> None:
    manifest = manifest_of(CONTENT)
    with memory_of(CONTENT) as fd:
        ImageDisk(tmp_path).write(manifest, fd)
    (written,) = tmp_path.rglob("manifest.json")
    written.write_bytes(damaged)
    assert ImageDisk(tmp_path).find(key_of(manifest)) is None
    assert images_below(tmp_path) == []


def test_what_a_killed_store_began_is_removed(tmp_path: Path) -> None:
    begun = tmp_path / FINGERPRINT / ".writing-abc"
    begun.mkdir(parents=True)
    (begun / "image.bin").write_bytes(CONTENT)
    ImageDisk(tmp_path).clean()
    assert images_below(tmp_path) == []


def test_but_not_what_another_store_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = image_disk._write_image

    def while_another_starts(path: Path, fd: int, nbytes: int) -> None:
        whole(path, fd, nbytes)
        ImageDisk(tmp_path).clean()

    monkeypatch.setattr(image_disk, "_write_image", while_another_starts)
    with memory_of(CONTENT) as fd:
        ImageDisk(tmp_path).write(manifest_of(CONTENT), fd)
    assert images_below(tmp_path) == [CONTENT]


@pytest.mark.parametrize("theirs", [CONTENT, CONTENT[::-1]], ids=["the same", "another"])
def test_two_stores_that_write_the_same_image_at_once_leave_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: bytes
) -> None:
    old = image_disk._delete_folder

    def then_another_is_first(folder: Path) -> None:
        monkeypatch.setattr(image_disk, "_delete_folder", old)
        old(folder)
        with memory_of(theirs) as fd:
            ImageDisk(tmp_path).write(manifest_of(theirs), fd)

    monkeypatch.setattr(image_disk, "_delete_folder", then_another_is_first)
    with memory_of(CONTENT) as fd:
        ImageDisk(tmp_path).write(manifest_of(CONTENT), fd)
    assert images_below(tmp_path) == [CONTENT]
    assert ImageDisk(tmp_path).find(key_of(manifest_of(CONTENT))) == manifest_of(CONTENT)
