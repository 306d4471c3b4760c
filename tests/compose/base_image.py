"""The image that all others are built on: pulled where that works, else made of Debian's packages."""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.compose.debian_packages import install_packages
from tests.compose.docker_engine import Engine
from tests.compose.shell import CommandFailed, Shell

PULLED = "python:3.12-slim"
MADE = "prism-base:bookworm"
RELEASE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
PULL_DEADLINE_S = 60.0
BOOTSTRAP_DEADLINE_S = 420.0
IMPORT_DEADLINE_S = 120.0
# What debootstrap copies from this machine or leaves of its work.
REMOVED = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
    "etc/hostname",
    "etc/machine-id",
    "etc/apt/apt.conf.d",
)


@dataclass(frozen=True)
class BaseImage:
    """`name` is its reference; `how` it was had, in words, and how long that took in seconds."""

    name: str
    how: str
    seconds: float


async def base_image(engine: Engine, cache: Path) -> BaseImage:
    """A Debian-based image with python3 and its venv module. Made ones are kept in `cache`.

    Raises CommandFailed or NotInstallable where it can be neither pulled nor made.
    """
    began = time.monotonic()
    for name in (PULLED, MADE):
        if await _there(engine, name):
            return BaseImage(name, "there already", time.monotonic() - began)
    try:
        await engine.docker("pull", "--quiet", PULLED, timeout_s=PULL_DEADLINE_S)
        return BaseImage(PULLED, "pulled", time.monotonic() - began)
    except CommandFailed:
        archive = cache / f"base-{RELEASE}.tar"
    how = "imported from the cache"
    if not archive.exists():
        print(f"== {PULLED} cannot be pulled: making {MADE} with debootstrap (minutes)", flush=True)
        if not engine.shell.which("debootstrap"):
            await install_packages(engine.shell, ["debootstrap"])
        await _make(engine.shell, archive)
        how = "made with debootstrap"
    await engine.docker("import", str(archive), MADE, timeout_s=IMPORT_DEADLINE_S)
    return BaseImage(MADE, how, time.monotonic() - began)


async def _there(engine: Engine, name: str) -> bool:
    return bool((await engine.docker("image", "ls", "--quiet", name)).strip())


async def _make(shell: Shell, archive: Path) -> None:
    """Write the base's file system to `archive`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prism-base-") as folder:
        root = Path(folder) / "root"
        await shell.run(
            *("debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(root), *mirror()),
            timeout_s=BOOTSTRAP_DEADLINE_S,
        )
        _strip(root)
        beside = archive.with_suffix(".new")
        await shell.run(
            "tar", "--numeric-owner", "-C", str(root), "-cf", str(beside), ".", timeout_s=IMPORT_DEADLINE_S
        )
        beside.replace(archive)


def _strip(root: Path) -> None:
    for name in REMOVED:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
            path.mkdir()
        else:
            path.unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text("")
    # A mirror of this machine's is no other machine's.
    (root / "etc/apt/sources.list").write_text("")


def mirror(sources: tuple[Path, ...] = SOURCES) -> list[str]:
    """Where this machine has its Debian packages from; nothing where it does not say: debootstrap then goes
    by its own default."""
    files = [file for path in sources for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    for file in files:
        if not file.is_file():
            continue
        for word in file.read_text(errors="replace").split():
            if word.startswith(("http://", "https://")) and word.rstrip("/").endswith("/debian"):
                return [word.rstrip("/")]
    return []
