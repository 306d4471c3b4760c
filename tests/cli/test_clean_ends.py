"""However the system ends, nothing of it stays: no process, socket, shared memory or temporary file."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
from tests.leftovers import Leftovers
from tests.processes import command_line, descendants

from prism.cli.demo import tiny_placement

pytestmark = pytest.mark.engine

DEADLINE_S = 90.0
TOKENS = 300
SERVICES = ("gateway", "global_scheduler", "gpu_worker", "model_store")


class Stream(threading.Thread):
    """One long answer, read as it comes."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.tokens = 0
        self.complete = False
        self._url = url

    def run(self) -> None:
        body = {
            "model": "tiny-llama",
            "input_ids": [5, 6, 7],
            "sampling_params": {"max_new_tokens": TOKENS, "ignore_eos": True},
            "stream": True,
        }
        try:
            with httpx.stream("POST", f"{self._url}/generate", json=body, timeout=DEADLINE_S) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        self.tokens = len(event.get("output_ids", []))
                        self.begun.set()
                    self.complete = self.complete or line == "data: [DONE]"
        except httpx.TransportError:
            self.complete = False


class Launched:
    """A running `prism up` with a stream in progress."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, stream: Stream, log: Path) -> None:
        self.process = process
        self.url = url
        self.stream = stream
        self.log = log

    def service(self, name: str) -> psutil.Process:
        """The process of one service."""
        return next(
            child
            for child in psutil.Process(self.process.pid).children()
            if f"prism.{name}" in command_line(child)
        )

    def engines(self) -> list[psutil.Process]:
        """The engine hosts."""
        everything = descendants(self.process.pid)
        return [child for child in everything if command_line(child)[:1] == ["prism-engine tiny-llama"]]


@contextmanager
def launched(model: Path, folder: Path, leftovers: Leftovers) -> Iterator[Launched]:
    placement = folder / "placement.json"
    placement.write_bytes(msgspec.json.encode(tiny_placement([model])))
    log = folder / "log"
    arguments = ["up", str(placement), "--port", "0", "--worker-memory-gb", "0.1", "--store-memory-gb", "0.5"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "prism.cli.main", *arguments, "--image-dir", str(folder / "images")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **leftovers.environment},
        )
        try:
            assert process.stdout is not None
            ready = re.fullmatch(r"gateway ready at (\S+)\n", process.stdout.readline())
            assert ready is not None, log.read_text()
            stream = Stream(ready.group(1))
            stream.start()
            assert stream.begun.wait(DEADLINE_S), log.read_text()
            leftovers.note(descendants(process.pid))
            yield Launched(process, ready.group(1), stream, log)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def interrupt(system: Launched) -> None:
    """Ctrl-C."""
    system.process.send_signal(signal.SIGINT)
    assert system.process.wait(DEADLINE_S) == 0


def interrupt_twice(system: Launched) -> None:
    """Ctrl-C, and again while it drains."""
    system.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + DEADLINE_S
    while "stopping" not in system.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    system.process.send_signal(signal.SIGINT)
    assert system.process.wait(DEADLINE_S) == 130


def terminate(system: Launched) -> None:
    """SIGTERM, as by a supervisor."""
    system.process.terminate()
    assert system.process.wait(DEADLINE_S) == 0


def kill(system: Launched) -> None:
    """kill -9 of the launcher; nats-server goes at once as well, so nothing can be finished."""
    system.process.kill()
    system.process.wait()


def kill_everything_else(system: Launched) -> None:
    """kill -9 of an engine and of each service, then Ctrl-C."""
    for engine in system.engines():
        engine.kill()
    for name in SERVICES:
        system.service(name).kill()
    interrupt(system)


def kill_nats(system: Launched) -> None:
    """kill -9 of nats-server: one comes in its place, a request works, then Ctrl-C."""
    nats = next(
        child for child in psutil.Process(system.process.pid).children() if child.name() == "nats-server"
    )
    nats.kill()
    deadline = time.monotonic() + DEADLINE_S
    while not re.search(r"nats +\| ended with status -9, started again", system.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    body = {"model": "tiny-llama", "prompt": "Hello", "max_tokens": 4}
    answer = httpx.post(f"{system.url}/v1/completions", json=body, timeout=DEADLINE_S)
    assert answer.status_code == 200, answer.text
    interrupt(system)


FINISHES = (interrupt, terminate, kill_nats)


ENDS = (interrupt, interrupt_twice, terminate, kill, kill_everything_else, kill_nats)


@pytest.mark.parametrize("end", ENDS)
def test_nothing_stays_behind(
    end: Callable[[Launched], None], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    leftovers = Leftovers(tmp_path / "tmp")
    with launched(tiny_models["tiny-llama"], tmp_path, leftovers) as system:
        end(system)
    system.stream.join(DEADLINE_S)
    assert not system.stream.is_alive()
    if end in FINISHES:
        assert system.stream.complete
        assert system.stream.tokens == TOKENS
    assert leftovers.found(DEADLINE_S) == []
