"""What lies where in a folder of images on disk, and the locks that keep it there.

An image is `<fingerprint>/<digest of its layout>/{image.bin, manifest.json}`. Locks are the kernel's, which
takes them from a process that dies; stores of one host that share the folder see each other's.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

FINGERPRINT = re.compile(r"[0-9a-f]{32}")
IMAGE, MANIFEST = "image.bin", "manifest.json"
COMPLETE = "complete"
"""Within a folder of a name that begins with WRITING: what becomes an image's folder."""
WRITING = ".writing-"


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Nobody else has this folder locked, or only `shared` as well. Raises OSError when somebody has."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def removed(folder: Path) -> bool:
    """Remove an image that nobody has locked, its bytes first; whether they are gone."""
    try:
        with locked(folder):
            (folder / IMAGE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
