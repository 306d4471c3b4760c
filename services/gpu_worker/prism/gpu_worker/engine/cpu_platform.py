"""Engines on a CPU: torch's own attention, memory in arenas of shared memory."""

from collections.abc import Callable
from typing import Any

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import cpu_ranks, memory_saver
from prism.gpu_worker.engine.arena import MemoryArena
from prism.gpu_worker.engine.arena_kv import ArenaKvMemory
from prism.gpu_worker.engine.deferred_graphs import DeferredGraphs
from prism.gpu_worker.engine.ranks import Ranks
from prism.gpu_worker.engine.weights import ModelWeights
from prism.gpu_worker.engine_protocol import StartEngine

KV_ARENA_SLACK = 2


class CpuPlatform:
    """SGLang on this host's CPU."""

    weights_class: Callable[..., ModelWeights] = ModelWeights
    gpu = 0
    one_memory = True
    graphs: DeferredGraphs | None = None

    def __init__(self, start: StartEngine, ranks: Ranks) -> None:
        self._start = start
        self._ranks = ranks
        self._kv = MemoryArena("prism-kv", max(start.kv_bytes, start.kv_cap_bytes) * KV_ARENA_SLACK)

    def prepare(self) -> None:
        """KV pools go into the arena."""
        memory_saver.install(self._kv)
        if self._ranks.size > 1:
            cpu_ranks.prepare(self._ranks.size)

    def server_args(self, start: StartEngine) -> dict[str, Any]:
        """No graphs, no overlap: there is no second processor to overlap with."""
        return {
            "device": "cpu",
            "attention_backend": "torch_native",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
        }

    def kv_memory(self, scheduler: Any) -> ArenaKvMemory:
        """The arena, within the first quota. Raises PrismError(out_of_memory) when SGLang took more address
        space than the largest quota, or when the first has no room for a token."""
        largest = max(self._start.kv_bytes, self._start.kv_cap_bytes)
        if self._kv.used > largest:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{self._start.model}: the KV cache takes {self._kv.used} bytes, its quota is {largest} at "
                "most; raise max_memory_pool_size",
            )
        memory = ArenaKvMemory(self._kv, scheduler)
        memory.set_limit(self._start.kv_bytes)
        if memory.limit_tokens < 2:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{self._start.model}: a KV quota of {self._start.kv_bytes} bytes holds no token; raise "
                "max_memory_pool_size",
            )
        return memory

    def arenas(self, weights: ModelWeights) -> tuple[int, int]:
        """Both lie in arenas."""
        return weights.arena.fd, self._kv.fd
