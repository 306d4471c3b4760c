"""Room on disk: which images go so that another fits, by the same decision as in memory."""

import contextlib
import errno
import logging
import shutil
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from prism.model_store.eviction import HeldImage, choose_victims
from prism.model_store.image_files import COMPLETE, FINGERPRINT, IMAGE, MANIFEST, WRITING, removed

log = logging.getLogger(__name__)

BLOCK_BYTES = 512
"""The unit of `st_blocks`, whatever the file system's own is."""


def make_room(root: Path, nbytes: int, limit_bytes: int | None, in_use: Collection[Path]) -> None:
    """Remove images below `root`, unused for longest first, so that `nbytes` more fit: on the disk, and in
    the `limit_bytes` that all of them together may take. None of `in_use` goes, and none that anybody reads
    or writes. Blocks.

    Raises OSError(ENOSPC) when too few can go; then, as a rule, all stay.
    """
    folders = _image_folders(root)
    images = {number: _held(number, folder, folder in in_use) for number, folder in enumerate(folders)}
    on_disk = free = shutil.disk_usage(root).free - _bytes_to_be_written(root)
    if limit_bytes is not None:
        used = sum(image.nbytes for image in images.values()) + _bytes_being_written(root)
        free = min(on_disk, limit_bytes - used)
    while victims := choose_victims(list(images.values()), free, nbytes):
        for number in victims:
            if removed(folders[number]):
                image = images.pop(number)
                free += image.nbytes
                log.info(
                    "removed the image in %s, the one unused for longest, for room: %.2f GB",
                    folders[number],
                    image.nbytes / 1e9,
                )
            else:
                images[number] = replace(images[number], busy=True)
    if victims is None:
        raise OSError(errno.ENOSPC, _too_little(on_disk, limit_bytes))


def _too_little(free_bytes: int, limit_bytes: int | None) -> str:
    free = f"{free_bytes / 1e9:.1f} GB are free there"
    if limit_bytes is None:
        return free
    return f"{free}, images may take {limit_bytes / 1e9:.1f} GB (PRISM_STORE_DISK_GB), and too few can go"


def _image_folders(root: Path) -> list[Path]:
    return [path for path in root.glob("*/[!.]*") if FINGERPRINT.fullmatch(path.parent.name)]


def _held(number: int, folder: Path, busy: bool) -> HeldImage:
    """The image in `folder`, or what an interrupted removal has left of it."""
    last_used = 0.0
    with contextlib.suppress(OSError):
        last_used = (folder / MANIFEST).stat().st_mtime
    return HeldImage(number, _size(folder / IMAGE), busy, superseded=False, last_used=last_used)


def _bytes_being_written(root: Path) -> int:
    return sum(_size(path) for path in _being_written(root))


def _bytes_to_be_written(root: Path) -> int:
    """What files of their final size have yet to take of the disk."""
    return sum(max(0, _size(path) - _bytes_taken(path)) for path in _being_written(root))


def _being_written(root: Path) -> Iterator[Path]:
    return root.glob(f"*/{WRITING}*/{COMPLETE}/{IMAGE}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _bytes_taken(path: Path) -> int:
    try:
        return path.stat().st_blocks * BLOCK_BYTES
    except OSError:
        return 0
