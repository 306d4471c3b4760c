"""What differs between engines on a CPU and on a GPU, behind one interface."""

from collections.abc import Callable
from typing import Any, Protocol

from prism.gpu_worker.engine.deferred_graphs import DeferredGraphs
from prism.gpu_worker.engine.ranks import Ranks
from prism.gpu_worker.engine.weights import ModelWeights
from prism.gpu_worker.engine_protocol import EngineDevice, StartEngine


class KvMemory(Protocol):
    """The memory behind a KV cache, bounded by a quota and given back while dozing.

    It comes in pages of `page_bytes`; `overhead_bytes` of a quota hold no tokens.
    """

    page_bytes: int
    overhead_bytes: int

    @property
    def limit_tokens(self) -> int:
        """Tokens that the quota has room for."""
        ...

    def set_limit(self, limit_bytes: int) -> tuple[int, int]:
        """Bound what may be behind it: raised at once, lowered by evicting prefixes, then by retracting
        requests. Returns the bound that holds now, higher than asked for where not enough could be freed,
        and how many requests were retracted."""
        ...

    def map(self) -> None:
        """Make the KV cache usable. Raises PrismError(out_of_memory) when there is no memory for it."""

    def unmap(self) -> None:
        """Give its memory back; nothing is cached in it any more."""

    def held_tokens(self) -> int:
        """Tokens of requests in it, without cached prefixes that could be evicted."""
        ...


class Platform(Protocol):
    """One kind of device, for one engine's life."""

    gpu: int
    """Which of the devices that this process sees is its own."""

    one_memory: bool
    """Whether ranks share what the worker reserves, or have each as much on a device of its own."""

    @property
    def weights_class(self) -> Callable[..., ModelWeights]:
        """How weights come into the device's memory and leave it."""
        ...

    graphs: DeferredGraphs | None
    """CUDA graphs that are still to be captured; None where they are there from the start, or never."""

    def prepare(self) -> None:
        """Before the scheduler is made: what SGLang must find in place."""

    def server_args(self, start: StartEngine) -> dict[str, Any]:
        """SGLang's arguments that depend on the device."""
        ...

    def kv_memory(self, scheduler: Any) -> KvMemory:
        """The scheduler's KV memory. Raises PrismError when it is not what it must be."""
        ...

    def arenas(self, weights: ModelWeights) -> tuple[int, int]:
        """File descriptors of the memory behind weights and KV cache, -1 where there are none."""
        ...


def platform_for(start: StartEngine, ranks: Ranks) -> Platform:
    """The platform that `start` names; imports only that one's libraries."""
    if start.options.device is EngineDevice.CUDA:
        from prism.gpu_worker.engine.cuda_platform import CudaPlatform

        return CudaPlatform(start, ranks)
    from prism.gpu_worker.engine.cpu_platform import CpuPlatform

    return CpuPlatform(start, ranks)
