"""What Triton does once in a process, before its first kernel of all: done by launching a small one.

It hashes its own files (libtriton is 0.4 GB: half a second), loads the driver's part and compiles nothing
that is in its cache.
"""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _increment(values, count: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, count)
    tl.store(values + at, tl.load(values + at) + 1)


def start_triton() -> None:
    """Launch a kernel on the current device, and wait for it."""
    values = torch.zeros(16, dtype=torch.int32, device="cuda")
    _increment[(1,)](values, 16)
    torch.cuda.synchronize()
