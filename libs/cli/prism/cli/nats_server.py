"""A NATS server of our own: the real binary, JetStream on, loopback, a port that the kernel chooses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism.common.errors import ErrorCode, PrismError
from prism.common.process import die_with_parent

ANY_PORT = -1
START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 5.0
MAX_PAYLOAD = 8 * 1024 * 1024
"""Bytes of the largest message."""


class NatsServer:
    """A running server: `url` to connect to, `process` to watch."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def stop(self) -> None:
        """End the server, politely first."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def find_nats_server() -> str:
    """Path of the nats-server binary: beside this Python, else on PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise PrismError(
            ErrorCode.INTERNAL, "nats-server not found; run `make setup`, or point --nats at a running server"
        )
    return found


def write_nats_config(folder: Path, *, port: int, max_payload: int = MAX_PAYLOAD) -> None:
    """Have the server of `folder` listen on `port` (ANY_PORT: the kernel chooses) from its next start on."""
    folder.mkdir(parents=True, exist_ok=True)
    _config(folder).write_text(
        f'listen: "127.0.0.1:{port}"\n'
        f"max_payload: {max_payload}\n"
        f'jetstream {{ store_dir: "{folder / "jetstream"}" }}\n'
        f'ports_file_dir: "{folder}"\n'
        f'log_file: "{folder / "nats.log"}"\n'
    )


def nats_command(folder: Path) -> list[str]:
    """The command line of the server of `folder`. Raises PrismError when there is no nats-server."""
    return [find_nats_server(), "--config", str(_config(folder))]


def nats_environment() -> dict[str, str]:
    """What a server finds in its environment beside everything else."""
    return {"GOMAXPROCS": "2"}


def listening_url(folder: Path, pid: int) -> str:
    """Where the server `pid` of `folder` listens, empty as long as it does not."""
    for ports in folder.glob(f"*_{pid}.ports"):
        try:
            return str(json.loads(ports.read_text())["nats"][0])
        except (json.JSONDecodeError, KeyError, IndexError, OSError):
            continue
    return ""


def not_up(folder: Path) -> PrismError:
    """What to raise when the server of `folder` does not come up."""
    log = folder / "nats.log"
    tail = log.read_text()[-1000:] if log.exists() else "it wrote no log"
    return PrismError(ErrorCode.INTERNAL, f"nats-server did not come up in {folder}: {tail}")


@contextmanager
def nats_server(
    folder: Path, *, port: int = ANY_PORT, max_payload: int = MAX_PAYLOAD
) -> Iterator[NatsServer]:
    """Run a server with its JetStream state and logs in `folder`."""
    write_nats_config(folder, port=port, max_payload=max_payload)
    process = subprocess.Popen(
        nats_command(folder),
        stdin=subprocess.DEVNULL,
        env={**os.environ, **nats_environment()},
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    server = NatsServer(process, "")
    try:
        server.url = _wait_for_port(process, folder)
        yield server
    finally:
        server.stop()


def _wait_for_port(process: subprocess.Popen[bytes], folder: Path) -> str:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if url := listening_url(folder, process.pid):
            return url
        if process.poll() is not None:
            break
        time.sleep(0.005)
    raise not_up(folder)


def _config(folder: Path) -> Path:
    return folder / "nats.conf"
