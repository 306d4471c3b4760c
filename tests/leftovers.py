"""What a system leaves behind once it has ended: processes, sockets, shared memory, temporary files."""

import contextlib
import os
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import psutil
from tests.processes import command_line

SHARED_MEMORY = Path("/dev/shm")
LOOK_S = 0.05


class Leftovers:
    """Finds what is left of a system all of whose processes were started with `environment`.

    Their temporary files then go to `folder`, and their own copies of the environment name it. Engines write
    their title over theirs, so processes can also be noted while they live; so must be those
    whose shared memory counts, which nothing but their mappings tells from that of other programs.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment = {"TMPDIR": str(folder)}
        self._before = set(os.listdir(SHARED_MEMORY))
        self._segments: set[str] = set()
        self._noted: set[psutil.Process] = set()

    def note(self, processes: Iterable[psutil.Process]) -> None:
        """These belong to the system, and must be gone with it."""
        for process in processes:
            self._noted.add(process)
            self._segments |= _segments(process.pid) - self._before

    def found(self, deadline_s: float) -> list[str]:
        """What is left, in words; the system has `deadline_s` seconds to let go of everything."""
        deadline = time.monotonic() + deadline_s
        while (left := self._look()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return left

    def _look(self) -> list[str]:
        left = [
            f"process {process.pid}: {' '.join(command_line(process))[:120]}" for process in self._processes()
        ]
        left += [f"temporary file {path}" for path in self._files()]
        left += [f"socket {path}" for path in _unix_sockets() if path.startswith(f"{self.folder}/")]
        left += [f"shared memory {name}" for name in sorted(self._segments & set(os.listdir(SHARED_MEMORY)))]
        return left

    def _files(self) -> list[str]:
        # os.walk, unlike pathlib, bears that what it walks through is being removed.
        walk = os.walk(self.folder)
        return sorted(os.path.join(parent, name) for parent, *names in walk for name in chain(*names))

    def _processes(self) -> set[psutil.Process]:
        mark = f"TMPDIR={self.folder}".encode()
        alive = {process for process in self._noted if process.is_running()}
        for process in psutil.process_iter():
            try:
                marked = mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked:
                alive.add(process)
        return {process for process in alive if not _is_zombie(process)}


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _segments(pid: int) -> set[str]:
    """Names of the shared memory that a process has mapped or open."""
    paths: list[str] = []
    try:
        paths += [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                paths.append(os.readlink(entry.path))
    except OSError:
        pass
    return {path.removeprefix(f"{SHARED_MEMORY}/") for path in paths if path.startswith(f"{SHARED_MEMORY}/")}


def _unix_sockets() -> list[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [fields[7] for line in lines if len(fields := line.split()) > 7]
