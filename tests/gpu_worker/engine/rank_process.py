"""A rank that is started by a shell: takes what rank 0 hands on, and says who it is and what it was given.

Run as the shell runs its ranks; `DIES` in the environment ends it before it is warm.
"""

import os
import socket
import sys

from prism.gpu_worker.engine.link import EngineLink
from prism.gpu_worker.engine.ranks import follow_ranks
from prism.gpu_worker.engine_protocol import Dying, StartEngine


def main() -> None:
    """Be one rank."""
    connection, warm, rank = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    if os.environ.get("DIES"):
        sys.exit(3)
    os.write(warm, b"w")
    os.close(warm)
    link = EngineLink(connection)
    start = link.receive()
    assert isinstance(start, StartEngine)
    ranks, part = follow_ranks(rank, start, connection)
    group = os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"].removeprefix("file://")
    link.send(Dying(f"{ranks.rank} of {ranks.size}: {part.layout}, {os.path.exists(group)}"))


if __name__ == "__main__":
    main()
