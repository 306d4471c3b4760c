"""What a system leaves behind once it has ended: processes, sockets, shared memory, temporary files."""

import os
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
LOOK_S = 0.05


class Leftovers:
    """Finds what is left of a system all of whose processes were started with `environment`.

    Their temporary files then go to `folder`, and their own copies of the environment name it. Engines write
    their title over theirs, so processes can also be noted while they live.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment = {"TMPDIR": str(folder)}
        self._shared_memory = set(os.listdir(SHARED_MEMORY))
        self._noted: set[psutil.Process] = set()

    def note(self, processes: Iterable[psutil.Process]) -> None:
        """These belong to the system, and must be gone with it."""
        self._noted.update(processes)

    def found(self, deadline_s: float) -> list[str]:
        """What is left, in words; the system has `deadline_s` seconds to let go of everything."""
        deadline = time.monotonic() + deadline_s
        while (left := self._look()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return left

    def _look(self) -> list[str]:
        left = [f"process {process.pid}: {_title(process)}" for process in self._processes()]
        left += [f"temporary file {path}" for path in self._files()]
        left += [f"socket {path}" for path in _unix_sockets() if path.startswith(f"{self.folder}/")]
        left += [f"shared memory {name}" for name in set(os.listdir(SHARED_MEMORY)) - self._shared_memory]
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


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.NoSuchProcess:
        return "ended meanwhile"


def _unix_sockets() -> list[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [fields[7] for line in lines if len(fields := line.split()) > 7]
