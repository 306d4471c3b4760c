"""What has to be imported, or put on a GPU, to be known; in a process of its own. Prints one JSON object."""

import json
import os
import time

BYTES = 1 << 30
REPEATS = 4


def main() -> None:
    """Look, measure where there is a GPU, and say so."""
    seen: dict[str, object] = {}
    import torch

    seen["torch_cuda"] = torch.version.cuda
    seen["cuda_available"] = torch.cuda.is_available()
    try:
        # Only its operations: no patching of a library that is not here.
        os.environ["KVCACHED_AUTOPATCH"] = "0"
        import kvcached.vmm_ops  # noqa: F401
    except Exception as error:
        seen["kvcached"] = f"{type(error).__name__}: {error}"
    if seen["cuda_available"]:
        seen["pinned_bytes_per_s"] = _pinned_bandwidth()
    print(json.dumps(seen))


def _pinned_bandwidth() -> float:
    import torch

    host = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(BYTES, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, BYTES / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
