"""The device interface: how engines are made there and what their memory costs."""

from typing import Protocol

from prism.gpu_worker.shells import ShellSource


class Device(Protocol):
    """A kind of hardware that engines run on.

    `element_bytes` is the size of a weight or KV element there, None for the checkpoint's own;
    `dtype` is what engines are told to use; `fixed_bytes` is the device memory that an engine holds
    beyond weights and KV cache in any tier above staged.
    """

    name: str
    element_bytes: int | None
    dtype: str
    fixed_bytes: int
    copy_threads: int
    shells: ShellSource

    def layout(self, tp_rank: int, tp_size: int) -> str:
        """Names the engine-layout images that engines of this device can take."""
        ...
