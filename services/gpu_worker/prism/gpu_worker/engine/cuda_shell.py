"""A warm shell on a GPU: SGLang imported and a CUDA context made before there is a model for it.

Run as `python -m prism.gpu_worker.engine.cuda_shell CONNECTION WARM`, two inherited file descriptors: the
socket to the worker, and a pipe that gets a byte once the shell is warm.
"""

import gc
import os
import signal
import sys
import warnings

from prism.common.process import die_with_parent
from prism.gpu_worker.engine_logs import configure_engine_logging


def prepare_environment() -> None:
    """What SGLang and kvcached must see before they are imported."""
    os.environ.update(
        ENABLE_KVCACHED="true",
        KVCACHED_AUTOPATCH="1",
        KVCACHED_IPC_NAME=f"prism-{os.getpid()}",
        # A page spans all layers (8B: 128 MiB): what is kept in reserve is lost to the other models.
        KVCACHED_MIN_RESERVED_PAGES="1",
        KVCACHED_MAX_RESERVED_PAGES="1",
        KVCACHED_PAGE_PREALLOC_ENABLED="false",
        KVCACHED_LOG_LEVEL="WARNING",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )


def main() -> None:
    """Get warm, say so, and be an engine host until the worker is gone."""
    connection, warm = int(sys.argv[1]), int(sys.argv[2])
    configure_engine_logging()
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    prepare_environment()
    warnings.filterwarnings("ignore")
    import torch

    from prism.gpu_worker.engine import footprint

    torch.cuda.init()
    footprint.note("context")
    square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.mm(square, square)
    torch.cuda.synchronize()
    footprint.note("cublas")
    # Its workspace was for this one product: an engine computes on streams of its own, with others.
    del square
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    footprint.note("cublas_cleared")
    from sglang.srt.managers import tp_worker  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401  (imports every model class that can be)

    from prism.gpu_worker.engine.host import serve_and_exit

    footprint.note("imported")
    gc.collect()
    gc.freeze()
    os.write(warm, b"w")
    os.close(warm)
    serve_and_exit(connection)


if __name__ == "__main__":
    main()
