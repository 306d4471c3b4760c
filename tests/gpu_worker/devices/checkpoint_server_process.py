"""The checkpoint server over a stand-in for libcuda, in a process of its own.

`FAILING` in the environment is a JSON object of calls and the status that they answer; an order for the
process HANGING is never done, one for DYING ends the server.
"""

import json
import os
import signal
import sys
from typing import Any

from tests.gpu_worker.devices.fake_libcuda import FakeLibcuda

from prism.gpu_worker.devices.checkpoint_server import Hello, _say, serve
from prism.gpu_worker.devices.cuda_checkpoint import CheckpointDriver

HANGING, DYING = 13, 17


class Troubled(FakeLibcuda):
    """Hangs at one process, dies of another."""

    def cuCheckpointProcessLock(self, pid: int, arguments: Any) -> int:
        if pid == HANGING:
            signal.pause()
        if pid == DYING:
            os._exit(1)
        return super().cuCheckpointProcessLock(pid, arguments)


def main() -> None:
    """Serve as the real one does."""
    cuda = Troubled(4711, 4712, HANGING, DYING, failing=json.loads(os.environ.get("FAILING", "{}")))
    driver = CheckpointDriver(lambda _: cuda)
    _say(sys.stdout.buffer, Hello())
    serve(driver, sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
