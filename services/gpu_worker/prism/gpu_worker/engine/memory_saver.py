"""SGLang's memory-saver interface on a CPU: what is allocated in a region lies in an arena of ours.

SGLang wraps the allocation of its KV pools in `region("kv_cache")`; here the tensor factories called
inside one put their tensors into the KV arena, whatever kind of pool asks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from torch.overrides import TorchFunctionMode

from prism.gpu_worker.engine.arena import MemoryArena
from prism.gpu_worker.engine.tensor_factories import asked_for


class _AllocateIn(TorchFunctionMode):  # type: ignore[misc]
    """Within this mode, `torch.zeros` and `torch.empty` take their memory from an arena."""

    def __init__(self, arena: MemoryArena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.zeros, torch.empty):
            return self._arena.tensor(*asked_for(args, kwargs))
        return func(*args, **kwargs)


class ArenaMemorySaver(TorchMemorySaverAdapter):  # type: ignore[misc]
    """Puts KV pools into `kv`; weights are placed by the loader, which knows their layout."""

    def __init__(self, kv: MemoryArena) -> None:
        self._kv = kv

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        """Divert allocations of the KV region."""
        if tag != GPU_MEMORY_TYPE_KV_CACHE:
            yield
            return
        with _AllocateIn(self._kv):
            yield

    @contextmanager
    def configure_subprocess(self) -> Iterator[None]:
        """Nothing to prepare in children."""
        yield

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Nothing to switch off."""
        yield

    @contextmanager
    def cuda_graph(self, **_: Any) -> Iterator[None]:
        """No CUDA graphs on a CPU."""
        yield

    def pause(self, tag: str) -> None:
        """Arenas are unmapped by the engine host itself."""

    def resume(self, tag: str) -> None:
        """Arenas are mapped by the engine host itself."""

    @property
    def enabled(self) -> bool:
        """Always."""
        return True


def install(kv: MemoryArena) -> None:
    """Have every pool that SGLang makes in this process use `kv`."""
    saver = ArenaMemorySaver(kv)
    TorchMemorySaverAdapter.create = staticmethod(lambda enable: saver)
