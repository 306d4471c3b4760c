"""What the bus to the GPU carries: a large copy from pinned memory, the ceiling of every wake."""

import os
import subprocess
import sys

from prism.bench.gpu_processes import gpu_environment

BYTES = 4 << 30
REPEATS = 5
DEADLINE_S = 120.0

_PROGRAM = f"""
import time, torch
host = torch.empty({BYTES}, dtype=torch.uint8, pin_memory=True)
device = torch.empty({BYTES}, dtype=torch.uint8, device="cuda")
best = 0.0
for _ in range({REPEATS}):
    torch.cuda.synchronize()
    began = time.perf_counter()
    device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    best = max(best, {BYTES} / (time.perf_counter() - began))
print(best)
"""


def pinned_bandwidth() -> float:
    """Bytes per second from pinned host memory to the GPU, the best of some copies of 4 GiB.

    In a process of its own, so that no context of the measurement stays on the GPU.
    """
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
        env={**os.environ, **gpu_environment()},
    )
    return float(run.stdout.strip().splitlines()[-1])
