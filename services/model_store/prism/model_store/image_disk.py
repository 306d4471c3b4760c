"""Engine-layout images on disk: `<root>/<fingerprint>/<digest of the layout>/{image.bin, manifest.json}`.

Stores may share a folder: what is there is whole, what is being written or read is locked by who does it, and
of two who write the same the last stays. When an image was last used, its manifest's modification time tells.
"""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import xxhash

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.store import ImageManifest
from prism.model_store.content_hash import KIND
from prism.model_store.disk_room import make_room
from prism.model_store.file_errors import reading
from prism.model_store.image_files import COMPLETE, FINGERPRINT, IMAGE, MANIFEST, WRITING, locked
from prism.model_store.images import ImageKey
from prism.model_store.staging import ImagePlan, Segment

log = logging.getLogger(__name__)

_SEND_BYTES = 256 * 1024 * 1024
_TRIES = 10


class ImageDisk:
    """The images below `root`, which together take `limit_bytes` at most, or what the disk has. All methods
    block: call them from threads."""

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        self.root = root
        self._limit_bytes = limit_bytes
        self._deciding = threading.Lock()

    def clean(self) -> None:
        """Remove what a store that was killed in the middle of writing left behind, and the least recently
        used of images that are more than they may be."""
        for left_over in self.root.glob(f"*/{WRITING}*"):
            # Another store's that is at work on it, or is gone by now.
            with contextlib.suppress(OSError), locked(left_over):
                log.info("removing the unfinished %s", left_over)
                shutil.rmtree(left_over, ignore_errors=True)
        try:
            make_room(self.root, 0, self._limit_bytes, ())
        except FileNotFoundError:
            log.debug("nothing is in %s yet", self.root)
        except OSError as error:
            log.warning("more images than there may be stay in %s: %s", self.root, error.strerror or error)

    def find(self, key: ImageKey) -> ImageManifest | None:
        """The manifest of the image under `key`; None if there is none, none that can be read now or be
        verified, or only a broken one, which is deleted."""
        folder = self._folder(key)
        try:
            manifest = decode((folder / MANIFEST).read_bytes(), ImageManifest)
            size = (folder / IMAGE).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            # That tells of this store or this moment, not of the image.
            log.warning("the image in %s can't be read, it is done without: %s", folder, error)
            return None
        except PrismError as error:
            self.delete(key, f"its manifest is not readable ({error})")
            return None
        if (manifest.fingerprint, manifest.layout) != key or size != manifest.nbytes:
            self.delete(key, "its manifest does not belong to it")
            return None
        if not manifest.content_hash.startswith(KIND):
            # Of another version of the store, and perhaps in its use; `write` replaces it.
            return None
        return manifest

    def layouts(self, fingerprint: str) -> list[str]:
        """Layouts in which a model is on disk, the last used first."""
        found: list[tuple[float, str]] = []
        for path in (self.root / fingerprint).glob(f"[!.]*/{MANIFEST}"):
            with contextlib.suppress(OSError, PrismError):
                manifest = decode(path.read_bytes(), ImageManifest)
                found.append((path.stat().st_mtime, manifest.layout))
        return [layout for _, layout in sorted(found, reverse=True)]

    def plan(self, key: ImageKey, manifest: ImageManifest) -> ImagePlan:
        """How to read the image under `key` back."""
        whole = Segment(self._folder(key) / IMAGE, 0, 0, manifest.nbytes)
        return ImagePlan(manifest.nbytes, (whole,) if manifest.nbytes else (), manifest.tensors)

    @contextlib.contextmanager
    def kept(self, key: ImageKey) -> Iterator[None]:
        """Keep the image under `key` on disk for the length of the `with`. Raises PrismError(model_failed)
        when it is not there any more."""
        folder = self._folder(key)
        with contextlib.ExitStack() as stack:
            with reading(folder):
                stack.enter_context(locked(folder, shared=True))
            yield

    def touch(self, key: ImageKey) -> None:
        """Have the image under `key` count as used now, if it is there."""
        with contextlib.suppress(OSError):
            os.utime(self._folder(key) / MANIFEST)

    def holds(self, key: ImageKey) -> bool:
        """Whether an image is under `key`, as far as can be told without reading it."""
        try:
            return (self._folder(key) / MANIFEST).exists()
        except OSError:
            return False

    def write(self, manifest: ImageManifest, fd: int, in_use: Collection[ImageKey] = ()) -> None:
        """Write the image in the memfd `fd`, complete or not at all, even if power fails. Where room is
        lacking, images go that were unused for longest, none of `in_use`.

        Raises PrismError(internal) when the disk does not take it.
        """
        key = ImageKey(manifest.fingerprint, manifest.layout)
        folder = self._folder(key)
        present = self.find(key)
        if present is not None and present.content_hash == manifest.content_hash:
            return
        # The one that this one is to replace is of no use any more.
        kept = {self._folder(other) for other in in_use if other != key and other.layout}
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(
                    prefix=WRITING, dir=folder.parent, ignore_cleanup_errors=True
                ) as temporary,
                locked(Path(temporary)),
            ):
                complete = Path(temporary) / COMPLETE
                complete.mkdir()
                with self._deciding:
                    make_room(self.root, manifest.nbytes, self._limit_bytes, kept)
                    _take_up(complete / IMAGE, manifest.nbytes)
                _write_image(complete / IMAGE, fd, manifest.nbytes)
                _write_synced(complete / MANIFEST, encode(manifest))
                _sync_folder(complete)
                _put_in_place(complete, folder)
            _sync_folder(folder.parent)
        except OSError as error:
            raise PrismError(
                ErrorCode.INTERNAL,
                f"the image of {manifest.nbytes} bytes could not be written below {folder.parent}: "
                f"{error.strerror or error}; it stays in memory only (PRISM_IMAGE_DIR chooses another disk)",
            ) from error

    def delete(self, key: ImageKey, why: str) -> None:
        """Remove an image that can't be trusted."""
        folder = self._folder(key)
        log.warning("deleting the image in %s: %s; it is made anew", folder, why)
        shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, key: ImageKey) -> Path:
        # Fingerprints reach us from outside and become a path.
        if not FINGERPRINT.fullmatch(key.fingerprint) or not key.layout:
            raise PrismError(
                ErrorCode.INVALID_REQUEST,
                f"an engine image needs a fingerprint of 32 hex digits and a layout, not {key}",
            )
        return self.root / key.fingerprint / xxhash.xxh3_64_hexdigest(key.layout.encode())


def _take_up(path: Path, nbytes: int) -> None:
    """Make a file of its final size, so that others who look for room count it."""
    with path.open("wb") as file:
        file.truncate(nbytes)


def _write_image(path: Path, fd: int, nbytes: int) -> None:
    with path.open("r+b") as file:
        done = 0
        while done < nbytes:
            count = os.sendfile(file.fileno(), fd, done, min(_SEND_BYTES, nbytes - done))
            if count == 0:
                raise OSError("the memory of the image is smaller than its manifest says")
            done += count
        os.fsync(file.fileno())


def _put_in_place(complete: Path, folder: Path) -> None:
    """Have `complete` be `folder`, in place of what is there, or comes there from another store meanwhile."""
    for _ in range(_TRIES):
        _delete_folder(folder)
        try:
            complete.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
    raise OSError(errno.EBUSY, "others keep writing it")


def _delete_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _write_synced(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
