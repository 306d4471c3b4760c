"""A shell for tests: as its environment says, it ends once before it is warm, never gets warm, or waits."""

import os
import socket
import sys
from pathlib import Path


def main() -> None:
    """Get warm, or not, and wait."""
    connection, warm = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    marker = os.environ.get("FAILS_UNTIL_EXISTS")
    if marker and not Path(marker).exists():
        Path(marker).touch()
        sys.exit(7)
    if not os.environ.get("NEVER_WARM"):
        os.write(warm, b"w")
        os.close(warm)
    connection.recv(1)


if __name__ == "__main__":
    main()
