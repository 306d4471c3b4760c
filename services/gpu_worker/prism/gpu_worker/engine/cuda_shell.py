"""A warm shell on GPUs: SGLang imported and a CUDA context made before there is a model for it.

Run as `python -m prism.gpu_worker.engine.cuda_shell CONNECTION WARM`, two inherited file descriptors: the
socket to the worker, and a pipe that gets a byte once the shell is warm. PRISM_RANKS says for how many GPUs:
for each but the first it starts a process of its own, `... cuda_shell CONNECTION WARM RANK`, whose connection
leads here. All of them keep the descriptor open that PRISM_SHELL_ALIVE names.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial

from prism.common.process import die_with_parent
from prism.gpu_worker.engine.process_group import meet_in_memory
from prism.gpu_worker.engine_logs import configure_engine_logging
from prism.gpu_worker.kernel_caches import keep_compiled_kernels
from prism.gpu_worker.kvcached_segments import segment_name
from prism.gpu_worker.started_shells import ALIVE

RANKS = "PRISM_RANKS"
MODULE = "prism.gpu_worker.engine.cuda_shell"
STACK_BYTES = 256


def prepare_environment(shell_pid: int, rank: int) -> None:
    """What SGLang and kvcached must see before they are imported, in a rank of the shell `shell_pid`."""
    os.environ.update(
        ENABLE_KVCACHED="true",
        KVCACHED_AUTOPATCH="1",
        # A page spans all layers (8B: 128 MiB): what is kept in reserve is lost to the other models.
        KVCACHED_MIN_RESERVED_PAGES="1",
        KVCACHED_MAX_RESERVED_PAGES="1",
        KVCACHED_PAGE_PREALLOC_ENABLED="false",
        # Quotas say how much may be cached: kvcached would evict what is beyond 16,000 tokens.
        KVCACHED_MAX_CACHED_TOKENS="-1",
        # The worker keeps 4 GiB for what no quota counts; of an H200 kvcached would leave 7 alone.
        KVCACHED_GPU_UTILIZATION="0.99",
        KVCACHED_LOG_LEVEL="WARNING",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    keep_compiled_kernels()
    # 8 MiB for each stream and handle, in place of Hopper's 32: as many as a dozing engine keeps.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    # A rank's own too, and not the one that it inherits: each maps its pages itself.
    os.environ["KVCACHED_IPC_NAME"] = segment_name(shell_pid, rank)


class StartedRanks:
    """The other ranks of a shell on `size` GPUs, which get the descriptors `inherited`; `sockets` lead to
    them. They die with this process."""

    def __init__(self, size: int, inherited: Sequence[int], module: str = MODULE) -> None:
        self.sockets: list[socket.socket] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._pipe, write = os.pipe()
        for rank in range(1, size):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sockets.append(ours)
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs.fileno()), str(write), str(rank)],
                    pass_fds=[theirs.fileno(), write, *inherited],
                    stdin=subprocess.DEVNULL,
                )
            self.processes.append(process)
        os.close(write)

    def get_warm(self) -> bool:
        """Wait until each has said that it is warm; False when one has ended before."""
        told = 0
        try:
            while told < len(self.processes):
                said = os.read(self._pipe, len(self.processes))
                if not said:
                    return False
                told += len(said)
            return True
        finally:
            os.close(self._pipe)


def warm_up(gpu: int) -> None:
    """Import what an engine needs, and make a context with cuBLAS on `gpu`."""
    import torch

    from prism.gpu_worker.engine import cuda_driver, footprint

    torch.cuda.init()
    torch.cuda.set_device(gpu)
    # A context sets aside a stack for every thread that the GPU can hold: 1 KiB each is 264 MiB on a Hopper.
    cuda_driver.limit_stack(STACK_BYTES)
    footprint.record_allocations()
    footprint.note("context")
    # The product that SGLang starts with: its kernel is loaded then, too.
    square = torch.ones(16, 16, device="cuda", dtype=torch.float16)
    torch.mm(square, square)
    torch.cuda.synchronize()
    footprint.note("cublas")
    # Its workspace was for this one product: an engine computes on streams of its own, with others.
    del square
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    footprint.note("cublas_cleared")
    from sglang.srt.dllm import algorithm  # noqa: F401
    from sglang.srt.layers.attention import triton_backend  # noqa: F401
    from sglang.srt.managers import tp_worker  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401  (imports every model class that can be)

    from prism.gpu_worker.engine import cuda_platform, host  # noqa: F401
    from prism.gpu_worker.engine.torch_kernels import load_common_kernels
    from prism.gpu_worker.engine.triton_start import start_triton

    footprint.note("imported")
    start_triton()
    load_common_kernels()
    torch.cuda.empty_cache()
    footprint.note("kernels")
    gc.collect()
    gc.freeze()


def main() -> None:
    """Get warm, say so, and be an engine host until the worker is gone."""
    connection, warm = int(sys.argv[1]), int(sys.argv[2])
    rank = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    size = int(os.environ.get(RANKS, "1"))
    configure_engine_logging()
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    # Ranks are children of the shell that they belong to.
    prepare_environment(os.getppid() if rank else os.getpid(), rank)
    warnings.filterwarnings("ignore")
    inherited = [meet_in_memory(), int(os.environ[ALIVE])] if rank == 0 else []
    others = StartedRanks(size if rank == 0 else 1, inherited)
    warm_up(rank)
    if not others.get_warm():
        sys.exit("a rank of this shell ended before it was warm; its log says why")
    os.write(warm, b"w")
    os.close(warm)
    from prism.gpu_worker.engine.host import serve_and_exit
    from prism.gpu_worker.engine.ranks import follow_ranks, lead_ranks

    serve_and_exit(connection, partial(follow_ranks, rank) if rank else partial(lead_ranks, others.sockets))


if __name__ == "__main__":
    main()
