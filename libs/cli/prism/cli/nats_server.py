"""A NATS server of our own: the real binary, JetStream on, loopback, a port that the kernel chooses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prism.common.errors import ErrorCode, PrismError
from prism.common.process import die_with_parent

START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 5.0


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


@contextmanager
def nats_server(
    folder: Path, *, port: int = -1, max_payload: int = 8 * 1024 * 1024, inherited: Sequence[int] = ()
) -> Iterator[NatsServer]:
    """Run a server with its JetStream state and logs in `folder`; port -1 lets the kernel choose one. It gets
    the file descriptors `inherited`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\n'
        f"max_payload: {max_payload}\n"
        f'jetstream {{ store_dir: "{folder / "jetstream"}" }}\n'
        f'ports_file_dir: "{folder}"\n'
        f'log_file: "{folder / "nats.log"}"\n'
    )
    process = subprocess.Popen(
        [find_nats_server(), "--config", str(config)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "GOMAXPROCS": "2"},
        start_new_session=True,
        preexec_fn=die_with_parent,
        pass_fds=tuple(inherited),
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
        for ports in folder.glob(f"*{process.pid}.ports"):
            try:
                return str(json.loads(ports.read_text())["nats"][0])
            except (json.JSONDecodeError, KeyError, IndexError, OSError):
                continue
        if process.poll() is not None:
            break
        time.sleep(0.005)
    tail = (folder / "nats.log").read_text()[-1000:] if (folder / "nats.log").exists() else ""
    raise PrismError(ErrorCode.INTERNAL, f"nats-server did not come up in {folder}: {tail}")
