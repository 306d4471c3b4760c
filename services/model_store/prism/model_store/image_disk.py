"""Engine-layout images on disk: `<root>/<fingerprint>/<digest of the layout>/{image.bin, manifest.json}`.

Stores may share a folder: what is there is whole, what is being written is locked by who writes it, and of
two who write the same the last stays.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.store import ImageManifest
from prism.model_store.content_hash import KIND
from prism.model_store.images import ImageKey
from prism.model_store.staging import ImagePlan, Segment

log = logging.getLogger(__name__)

FINGERPRINT = re.compile(r"[0-9a-f]{32}")
IMAGE, MANIFEST = "image.bin", "manifest.json"
_TEMPORARY = ".writing-"
_SEND_BYTES = 256 * 1024 * 1024
_TRIES = 10


class ImageDisk:
    """The images below `root`. All methods block: call them from threads."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def clean(self) -> None:
        """Remove what a store that was killed in the middle of writing left behind."""
        for left_over in self.root.glob(f"*/{_TEMPORARY}*"):
            # Another store's that is at work on it, or is gone by now.
            with contextlib.suppress(OSError), _locked(left_over):
                log.info("removing the unfinished %s", left_over)
                shutil.rmtree(left_over, ignore_errors=True)

    def find(self, key: ImageKey) -> ImageManifest | None:
        """The manifest of the image under `key`; None if there is none, none that can be verified, or only a
        broken one, which is deleted."""
        folder = self._folder(key)
        try:
            manifest = decode((folder / MANIFEST).read_bytes(), ImageManifest)
            size = (folder / IMAGE).stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, PrismError) as error:
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
        """Layouts in which a model is on disk, the newest first."""
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

    def write(self, manifest: ImageManifest, fd: int) -> None:
        """Write the image in the memfd `fd`, complete or not at all, even if power fails.

        Raises PrismError(internal) when the disk does not take it.
        """
        key = ImageKey(manifest.fingerprint, manifest.layout)
        folder = self._folder(key)
        present = self.find(key)
        if present is not None and present.content_hash == manifest.content_hash:
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(
                    prefix=_TEMPORARY, dir=folder.parent, ignore_cleanup_errors=True
                ) as temporary,
                _locked(Path(temporary)),
            ):
                complete = Path(temporary) / "complete"
                complete.mkdir()
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


def _write_image(path: Path, fd: int, nbytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        # Else the disk would be full for everybody until the writing fails.
        raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB are free there")
    with path.open("wb") as file:
        done = 0
        while done < nbytes:
            count = os.sendfile(file.fileno(), fd, done, min(_SEND_BYTES, nbytes - done))
            if count == 0:
                raise OSError("the memory of the image is smaller than its manifest says")
            done += count
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else has this folder locked. Raises OSError when somebody has; the kernel takes the lock from a
    process that dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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
