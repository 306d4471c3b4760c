"""The process that lends a GPU's bus: `python -m prism.gpu_worker.lent_bus.lender SOCKET`.

CUDA_VISIBLE_DEVICES names that GPU first, then those whose memory it may be asked to copy into. A line on
stdout says that it listens. On stdin `+` keeps the bus for the worker's own wakes, `-` spares it; at the end
of stdin this process ends.
"""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism.common.process import die_with_parent
from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine_logs import configure_engine_logging
from prism.gpu_worker.lent_bus.session import Bus, Session

STACK_BYTES = 256
BACKLOG = 64
KEEP, SPARE = b"+", b"-"


@contextmanager
def lending(path: Path, bus: Bus) -> Iterator[None]:
    """Within this, whoever connects at `path` is served, by users of this account alone. The calling thread
    has a context, which sessions share. What a dead process left at `path` is removed."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    context = cuda_driver.current_context()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
        sock.listen(BACKLOG)
        served: dict[Session, threading.Thread] = {}
        accepting = threading.Thread(
            target=_accept, args=(sock, bus, context, served), name="accept", daemon=True
        )
        accepting.start()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            # Whoever waits for a connection gets an error.
            sock.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for session, thread in served.items():
                session.hang_up()
                thread.join()


def _accept(sock: socket.socket, bus: Bus, context: Any, served: dict[Session, threading.Thread]) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = sock.accept()
            for session in [each for each, thread in served.items() if not thread.is_alive()]:
                del served[session]
            session = Session(connection, bus, context)
            served[session] = threading.Thread(target=session.run, name="session", daemon=True)
            served[session].start()


def main() -> None:
    """Lend until the worker is gone."""
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_engine_logging()
    path = Path(sys.argv[1])
    cuda_driver.primary_context(0)
    cuda_driver.limit_stack(STACK_BYTES)
    bus = Bus()
    with lending(path, bus):
        print("ready", flush=True)
        while order := sys.stdin.buffer.read(1):
            if order == KEEP:
                bus.keep()
            elif order == SPARE:
                bus.spare()


if __name__ == "__main__":
    main()
