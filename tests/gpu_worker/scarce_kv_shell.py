"""An engine host that finds no memory for the KV cache of a model that wakes, while the file
PRISM_TEST_NO_KV_MEMORY is there.

Run as `python -m tests.gpu_worker.scarce_kv_shell FD`.
"""

import os
import sys
from pathlib import Path
from typing import Any

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.fork_server import prepare_environment


def main() -> None:
    """Make memory scarce, then serve."""
    prepare_environment()
    from prism.gpu_worker.engine.arena_kv import ArenaKvMemory
    from prism.gpu_worker.engine.host import serve_and_exit
    from prism.gpu_worker.engine.process_group import meet_in_memory

    scarce = Path(os.environ["PRISM_TEST_NO_KV_MEMORY"])
    make = ArenaKvMemory.__init__

    def make_scarce(memory: ArenaKvMemory, *arguments: Any) -> None:
        make(memory, *arguments)
        map_it = memory.map

        def map_if_there_is_memory() -> None:
            if scarce.exists():
                raise PrismError(ErrorCode.OUT_OF_MEMORY, "no memory for the KV cache", retry=True)
            map_it()

        vars(memory)["map"] = map_if_there_is_memory

    meet_in_memory()
    type.__setattr__(ArenaKvMemory, "__init__", make_scarce)
    serve_and_exit(int(sys.argv[1]))


if __name__ == "__main__":
    main()
