"""A piece of the weights that this GPU's own bus brings."""

from dataclasses import dataclass
from typing import Any

import torch

from prism.gpu_worker.engine import cuda_driver


@dataclass(frozen=True)
class CopiedPiece:
    """See arrivals.Piece: `event` happens behind its copy to the GPU `device`."""

    event: Any
    device: int
    context: Any

    def hold_back(self) -> None:
        """See arrivals.Piece."""
        cuda_driver.hold_back(torch.cuda.current_stream(self.device).cuda_stream, self.event)

    def wait(self) -> None:
        """See arrivals.Piece."""
        # Whoever waits may be a thread that has called no driver yet.
        cuda_driver.use_context(self.context)
        cuda_driver.wait_for_event(self.event)
