"""An engine host whose weights are copied back in small pieces that take their time.

Run as `python -m tests.gpu_worker.slow_copy_shell FD`. The last piece waits while the file
PRISM_TEST_HELD_COPY is there, and fails while PRISM_TEST_BROKEN_COPY is.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from prism.gpu_worker.fork_server import prepare_environment

PIECE_BYTES = 256 * 1024
PIECE_S = 0.005


def main() -> None:
    """Slow copies down, then serve."""
    prepare_environment()
    from prism.gpu_worker.engine import arena
    from prism.gpu_worker.engine.host import serve_and_exit
    from prism.gpu_worker.engine.process_group import meet_in_memory

    held = Path(os.environ["PRISM_TEST_HELD_COPY"])
    broken = Path(os.environ["PRISM_TEST_BROKEN_COPY"])
    read = os.preadv

    def slow_read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(PIECE_S)
        if offset + PIECE_BYTES >= os.fstat(fd).st_size:
            while held.exists():
                time.sleep(PIECE_S)
            if broken.exists():
                raise OSError("the copy is broken")
        return read(fd, buffers, offset)

    meet_in_memory()
    arena.COPY_CHUNK_BYTES = PIECE_BYTES
    vars(os)["preadv"] = slow_read
    serve_and_exit(int(sys.argv[1]))


if __name__ == "__main__":
    main()
