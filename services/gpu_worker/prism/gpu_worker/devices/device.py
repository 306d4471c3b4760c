"""The device interface: how engines are made there and what their memory costs."""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from prism.gpu_worker.devices.freezing import Freezer
from prism.gpu_worker.engine_protocol import EngineOptions, Ready
from prism.gpu_worker.shells import ShellSource


class Device(Protocol):
    """A kind of hardware that engines run on.

    `element_bytes` is the size of a weight or KV element there, None for the checkpoint's own;
    `dtype` is what engines are told to use; `fixed_bytes` is the device memory that an engine holds
    beyond weights and KV cache in any tier above staged. `copying` is held while weights are copied in, where
    two copies at once would only slow each other down. `freezer` takes the fixed cost, too.
    `rank_counts` are the values of tp_size that its engines can have; `profile` names the cost profile of
    such hardware, empty for none.
    """

    name: str
    element_bytes: int | None
    dtype: str
    fixed_bytes: int
    rank_counts: tuple[int, ...]
    profile: str
    copy_threads: int
    options: EngineOptions
    shells: ShellSource
    freezer: Freezer
    default_memory_bytes: int

    @property
    def copying(self) -> AbstractAsyncContextManager[object]:
        """See above."""
        ...

    def layout(self, tp_rank: int, tp_size: int) -> str:
        """Names the engine-layout images that engines of this device can take."""
        ...

    def resident_bytes(self, pid: int, ready: Ready) -> tuple[int, int]:
        """Device memory behind weights and KV cache of a live engine now, by who counts it there."""
        ...

    def left_bytes(self, pid: int, ready: Ready) -> int:
        """What a dozing engine still holds beyond `fixed_bytes`."""
        ...

    def held_bytes(self, pid: int, ready: Ready) -> int:
        """All device memory that an engine's process holds, `fixed_bytes` included."""
        ...
