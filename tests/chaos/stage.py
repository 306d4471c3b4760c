"""The system that faults are done to: two of each service, real engines, a NATS server that can go away."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

import msgspec
import psutil
from tests.chaos.cluster_view import ClusterView, cluster_view
from tests.processes import command_line, descendants
from tokenizers import Tokenizer

from prism.cli.demo import tiny_placement
from prism.cli.nats_server import NatsServer, nats_server
from prism.cli.service_process import ServiceProcess
from prism.cli.system import RunningSystem, SystemSettings, running_system
from prism.cli.tiny_check import check_prompts

WORKER_MEMORY_GB = 0.24
OF_EACH = 2
_LEADS = re.compile(r"\S+ leads, epoch \d+")


class RestartableNats:
    """A NATS server on one port and with one folder, however often it is killed and started."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._server: NatsServer | None = None
        self._port = -1

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"nats://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, on the port that it had before."""
        self._server = self._stack.enter_context(nats_server(self._folder, port=self._port))
        self._port = urlsplit(self._server.url).port or -1

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._server is not None
        self._server.process.kill()
        self._server.process.wait()

    def forget(self) -> None:
        """Lose everything that it has kept on disk."""
        shutil.rmtree(self._folder / "jetstream")


@dataclass
class Stage:
    """What faults need: the processes, and a look at what the bus says."""

    system: RunningSystem
    nats: RestartableNats
    view: ClusterView
    log: "ServiceLog"

    @property
    def leading(self) -> str:
        """The scheduler service that leads: the last one that said so."""
        return self.log.leading

    def gateways(self) -> list[str]:
        """Where the gateways listen now."""
        return list(self.system.gateway_urls.values())

    def services(self, kind: str) -> list[ServiceProcess]:
        """The processes of one service."""
        return self.system.of(kind)

    def engines(self) -> list[psutil.Process]:
        """All engine hosts."""
        found = []
        for service in self.services("gpu_worker"):
            if service.process is None or service.process.returncode is not None:
                continue
            for child in descendants(service.process.pid):
                if " ".join(command_line(child)).startswith("prism-engine"):
                    found.append(child)
        return found


def prompts_of(models: list[Path]) -> dict[str, list[list[int]]]:
    """Prompts as token ids whose greedy continuations are beyond doubt, by model."""
    prompts = {}
    for folder in models:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        texts = [text for text in check_prompts(tokenizer) if text]
        prompts[folder.name] = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return prompts


class ServiceLog:
    """Writes what all services log, and reads in it who leads."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.leading = ""

    def take(self, service: str, line: str) -> None:
        """One line."""
        print(service, line, file=self._file)
        if _LEADS.search(line):
            self.leading = service


@asynccontextmanager
async def stage(folder: Path, models: list[Path], log: Path) -> AsyncIterator[Stage]:
    """The whole system with OF_EACH of each service; its log lines go to the file `log`."""
    placement = folder / "placement.json"
    placement.write_bytes(msgspec.json.encode(tiny_placement(models)))
    with ExitStack() as stack:
        nats = RestartableNats(folder / "nats", stack)
        nats.start()
        lines = ServiceLog(stack.enter_context(log.open("w", buffering=1)))
        settings = SystemSettings(
            placement=placement,
            nats_url=nats.url,
            worker_memory_gb=WORKER_MEMORY_GB,
            store_memory_gb=1.0,
            image_dir=folder / "images",
            gateways=OF_EACH,
            schedulers=OF_EACH,
            workers=OF_EACH,
            stores=OF_EACH,
        )
        async with (
            running_system(settings, lines.take) as system,
            cluster_view(nats.url) as view,
        ):
            yield Stage(system, nats, view, lines)
