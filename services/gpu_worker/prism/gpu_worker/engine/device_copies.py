"""Small host values brought to the device without waiting for it."""

from collections.abc import Sequence

import torch


def on_device(values: Sequence[int], device: "torch.device | str") -> torch.Tensor:
    """A tensor (len(values),) of int64 on `device`; its content is there once the current stream comes to it.

    From pageable memory, as `torch.tensor(values, device=...)` copies, the caller would wait for all that the
    stream has to do before.
    """
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)
