"""Room on disk: images that nobody has used for longest go, and none that is in use."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.model_store.conftest import Running, StartStore, eventually
from tests.model_store.model_folders import big_model
from tests.model_store.store_clients import (
    LAYOUT,
    borrow,
    give_one_of,
    until_unleased,
)
from tests.model_store.test_image_disk import key_of, manifest_of, memory_of

from prism.common.errors import PrismError
from prism.common.messages.store import ImageKind, ImageManifest
from prism.model_store import image_disk
from prism.model_store.image_disk import ImageDisk

pytestmark = pytest.mark.core

SIZE = 1000
ROOM_FOR_TWO = 2 * SIZE


def content_of(name: str) -> bytes:
    return name.encode() * SIZE


def manifest(name: str) -> ImageManifest:
    return manifest_of(content_of(name), fingerprint=name * 32)


class Disk:
    """A disk of images named by a letter, each used at a moment of its own."""

    def __init__(self, root: Path, limit_bytes: int | None = ROOM_FOR_TWO) -> None:
        self.root = root
        self.disk = ImageDisk(root, limit_bytes)
        self._moment = 0

    def write(self, name: str, in_use: str = "") -> None:
        with memory_of(content_of(name)) as fd:
            self.disk.write(manifest(name), fd, [key_of(manifest(other)) for other in in_use])
        self._date(name)

    def use(self, name: str) -> None:
        before = self._file(name).stat().st_mtime
        self.disk.touch(key_of(manifest(name)))
        assert self._file(name).stat().st_mtime > before
        self._date(name)

    def _date(self, name: str) -> None:
        # A file system's clock may tick slower than a test runs.
        self._moment += 1
        os.utime(self._file(name), (self._moment, self._moment))

    def _file(self, name: str) -> Path:
        return next((self.root / (name * 32)).glob("[!.]*/manifest.json"))

    @property
    def names(self) -> str:
        return "".join(sorted(path.parts[-3][0] for path in self.root.glob("*/[!.]*/image.bin")))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """Room for two images."""
    return Disk(tmp_path)


def test_the_image_that_was_unused_for_longest_makes_room(disk: Disk) -> None:
    disk.write("a")
    disk.write("b")
    disk.use("a")
    disk.write("c")
    assert disk.names == "ac"


def test_without_a_limit_images_go_when_the_disk_lacks_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, limit_bytes=None)
    for name in "abc":
        disk.write(name)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=SIZE - 1))
    disk.write("d")
    assert disk.names == "bcd"


def test_an_image_in_use_stays(disk: Disk) -> None:
    disk.write("a")
    disk.write("b")
    disk.write("c", in_use="a")
    assert disk.names == "ac"


def test_an_image_that_is_being_read_stays(disk: Disk) -> None:
    disk.write("a")
    disk.write("b")
    with disk.disk.kept(key_of(manifest("a"))), disk.disk.kept(key_of(manifest("a"))):
        disk.write("c")
    assert disk.names == "ac"


def test_an_image_that_is_being_written_stays_and_counts(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write("a")
    disk.write("b")
    whole = image_disk._write_image

    def while_another_writes(path: Path, fd: int, nbytes: int) -> None:
        monkeypatch.setattr(image_disk, "_write_image", whole)
        Disk(disk.root).write("d")
        whole(path, fd, nbytes)

    monkeypatch.setattr(image_disk, "_write_image", while_another_writes)
    disk.write("c")
    assert disk.names == "cd"


def test_what_an_image_being_written_has_yet_to_take_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, limit_bytes=None)
    disk.write("a")
    disk.write("b")
    whole = image_disk._write_image

    def while_another_writes(path: Path, fd: int, nbytes: int) -> None:
        monkeypatch.setattr(image_disk, "_write_image", whole)
        Disk(disk.root, limit_bytes=None).write("d")
        whole(path, fd, nbytes)

    monkeypatch.setattr(image_disk, "_write_image", while_another_writes)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=SIZE * 3 // 2))
    disk.write("c")
    assert disk.names == "bcd"


def test_no_image_goes_in_vain(disk: Disk) -> None:
    disk.write("a")
    disk.write("b")
    with pytest.raises(PrismError, match=r"may take .*PRISM_STORE_DISK_GB.* it stays in memory only"):
        disk.write("c", in_use="ab")
    with (
        memory_of(bytes(3 * SIZE)) as fd,
        pytest.raises(PrismError, match=r"may take .*PRISM_STORE_DISK_GB"),
    ):
        disk.disk.write(manifest_of(bytes(3 * SIZE), fingerprint="c" * 32), fd)
    assert disk.names == "ab"


def test_an_image_that_is_made_anew_needs_no_room_beside_the_old_one(disk: Disk) -> None:
    disk.write("a")
    disk.write("b")
    anew = manifest_of(bytes(SIZE), fingerprint="a" * 32)
    with memory_of(bytes(SIZE)) as fd:
        disk.disk.write(anew, fd, [key_of(anew), key_of(manifest("b"))])
    assert disk.disk.find(key_of(anew)) == anew
    assert disk.names == "ab"


def test_what_an_interrupted_removal_left_counts_and_goes(disk: Disk) -> None:
    disk.write("a")
    next(disk.root.rglob("manifest.json")).unlink()
    disk.write("b")
    disk.write("c")
    assert disk.names == "bc"


def test_what_is_no_image_is_left_alone(disk: Disk) -> None:
    other = disk.root / "somebody's" / "folder"
    other.mkdir(parents=True)
    (other / "image.bin").write_bytes(bytes(SIZE))
    for name in "abc":
        disk.write(name)
    assert (other / "image.bin").exists()
    disk.root.joinpath("somebody's").rename(disk.root / "kept")
    assert disk.names == "bck"


def test_what_is_beyond_the_limit_goes_at_the_start(tmp_path: Path) -> None:
    before = Disk(tmp_path, limit_bytes=None)
    for name in "abcd":
        before.write(name)
    before.disk.clean()
    assert before.names == "abcd"
    ImageDisk(tmp_path, ROOM_FOR_TWO).clean()
    assert before.names == "cd"


def on_disk(running: Running) -> set[str]:
    """Fingerprints of the images in memory that are on disk too, as the store tells it."""
    return {image.fingerprint for image in running.store.report().images if image.on_disk}


async def test_copies_of_a_model_that_is_fetched_again_and_again_do_not_add_up(
    start_store: StartStore, tmp_path: Path
) -> None:
    folder = big_model(tmp_path / "m", 1)
    async with start_store(disk_bytes=2_500_000) as running:
        fingerprints = []
        for moment in range(1, 5):
            os.utime(folder / "model.safetensors", (moment, moment))
            fingerprints.append((await give_one_of(running, folder, os.urandom(1_000_000)))[0])
            await until_unleased(running)
            await eventually(lambda: fingerprints[-1] in on_disk(running))
        assert {path.parts[-3] for path in (tmp_path / "images").rglob("image.bin")} == set(fingerprints[-2:])
        assert on_disk(running) == set(fingerprints[-2:])


async def test_images_on_lease_stay_on_disk_and_being_lent_counts_as_use(
    start_store: StartStore, tmp_path: Path
) -> None:
    folders = {name: big_model(tmp_path / name, 1, seed) for seed, name in enumerate("abcd")}
    names: dict[str, str] = {}

    async def put(name: str) -> None:
        fingerprint, _ = await give_one_of(running, folders[name], os.urandom(1_000_000))
        names[fingerprint] = name
        await eventually(lambda: fingerprint in on_disk(running))

    def names_on_disk() -> str:
        return "".join(sorted(names[path.parts[-3]] for path in images.rglob("manifest.json")))

    def all_unused_for_long() -> None:
        for path in images.rglob("manifest.json"):
            moment = ord(names[path.parts[-3]])
            os.utime(path, (moment, moment))

    images = tmp_path / "images"
    async with start_store(disk_bytes=2_500_000) as running:
        await put("a")
        await put("b")
        all_unused_for_long()
        with await borrow(running, "m", folders["a"], LAYOUT):
            all_unused_for_long()
            await put("c")
            assert names_on_disk() == "ac"
        all_unused_for_long()
        with await borrow(running, "m", folders["a"], LAYOUT) as lent:
            assert lent.kind is ImageKind.ENGINE
        await until_unleased(running)
        await put("d")
        assert names_on_disk() == "ad"
