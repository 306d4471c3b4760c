"""Device memory of an engine as kernel or driver count it: what is freed is confirmed, not assumed."""

import asyncio
import time
from collections.abc import Callable

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.devices.device import Device
from prism.gpu_worker.engine_protocol import Ready

FREED_DEADLINE_S = 2.0
FREED_POLL_S = 0.002

Alive = Callable[[], tuple[int, Ready] | None]
"""Process id and memory of the engine that runs now, None for none."""


class CountedMemory:
    """What there is behind the engine of `model` that `alive` tells of; 0 bytes where none runs."""

    def __init__(self, model: str, device: Device, alive: Alive) -> None:
        self._model = model
        self._device = device
        self._alive = alive

    def resident_bytes(self) -> tuple[int, int]:
        """Behind weights and KV cache."""
        engine = self._alive()
        return self._device.resident_bytes(*engine) if engine is not None else (0, 0)

    def held_bytes(self) -> int:
        """All that its process holds."""
        engine = self._alive()
        return self._device.held_bytes(*engine) if engine is not None else 0

    def left_bytes(self) -> int:
        """What it holds beyond what a dozing engine does."""
        engine = self._alive()
        return self._device.left_bytes(*engine) if engine is not None else 0

    async def until_dozing(self) -> None:
        """Wait until there is no more than that of a dozing one. Raises PrismError after FREED_DEADLINE_S."""
        await self._until_gone(self.left_bytes)

    async def until_frozen(self) -> None:
        """Wait until there is nothing. Raises PrismError after FREED_DEADLINE_S."""
        await self._until_gone(self.held_bytes)

    async def _until_gone(self, counted: Callable[[], int]) -> None:
        # A driver may take a moment to count.
        deadline = time.monotonic() + FREED_DEADLINE_S
        while (left := counted()) and time.monotonic() < deadline:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(FREED_POLL_S)
        if left:
            text = f"{self._model}: {left} bytes are still mapped after the engine freed them"
            raise PrismError(ErrorCode.INTERNAL, text)
