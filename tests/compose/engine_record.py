"""What must be put back after an engine of ours, written down while it runs: a run that is killed leaves it
to the next one."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tests.compose.host_network import HostNetwork

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class EngineRecord:
    """`folder` holds the engine's run-time files, `before` is the machine's network without it. `run` is the
    process that started it, at the time `began`."""

    folder: Path
    before: HostNetwork
    run: int
    began: float

    @classmethod
    def of_this_run(cls, folder: Path, before: HostNetwork) -> "EngineRecord":
        """Of an engine that this process starts."""
        return cls(folder, before, os.getpid(), psutil.Process().create_time())

    def run_is_on(self) -> bool:
        """Whether the process that started the engine lives."""
        try:
            return psutil.Process(self.run).create_time() == self.began
        except psutil.NoSuchProcess:
            return False

    def write(self, path: Path) -> None:
        """To the file `path`."""
        before = {**asdict(self.before), "interfaces": sorted(self.before.interfaces)}
        told = {"folder": str(self.folder), "before": before, "run": self.run, "began": self.began}
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps({"boot": BOOT.read_text(), **told}, indent=1))
        beside.replace(path)


def read_engine_record(path: Path) -> EngineRecord | None:
    """The record in the file `path`, if there is one and the machine has not been started anew since."""
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    if told["boot"] != BOOT.read_text():
        return None
    before = told["before"]
    network = HostNetwork(before["rules"], before["forwarding"], frozenset(before["interfaces"]))
    return EngineRecord(Path(told["folder"]), network, told["run"], told["began"])
