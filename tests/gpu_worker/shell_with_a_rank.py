"""A shell with a process of another rank, which lives until the descriptor is closed that both inherit.

Run as `python -m tests.gpu_worker.shell_with_a_rank CONNECTION HELD`. It says a byte once the rank runs, and
ends with its connection.
"""

import os
import socket
import subprocess
import sys

from prism.gpu_worker.started_shells import ALIVE


def main() -> None:
    """Start the rank, say so, and wait for the end."""
    connection, held = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    waits = f"import os; os.read({held}, 1)"
    alive = int(os.environ[ALIVE])
    subprocess.Popen([sys.executable, "-c", waits], pass_fds=[held, alive], stdin=subprocess.DEVNULL)
    connection.send(b"r")
    connection.recv(1)
    os._exit(0)


if __name__ == "__main__":
    main()
