"""Engines on a CPU: torch's own attention, memory in arenas of shared memory."""

from collections.abc import Callable
from typing import Any

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import cpu_ranks, memory_saver
from prism.gpu_worker.engine.arena import MemoryArena
from prism.gpu_worker.engine.deferred_graphs import DeferredGraphs
from prism.gpu_worker.engine.ranks import Ranks
from prism.gpu_worker.engine.weights import ModelWeights
from prism.gpu_worker.engine_protocol import StartEngine

KV_ARENA_SLACK = 2


class ArenaKvMemory:
    """A KV cache that lies in an arena."""

    def __init__(self, arena: MemoryArena) -> None:
        self._arena = arena
        self.map = arena.map
        self.unmap = arena.unmap

    def held_tokens(self, scheduler: Any) -> int:
        """Tokens of requests, without cached prefixes."""
        free = scheduler.token_to_kv_pool_allocator.available_size()
        return int(scheduler.max_total_num_tokens - free - scheduler.tree_cache.evictable_size())


class CpuPlatform:
    """SGLang on this host's CPU."""

    weights_class: Callable[..., ModelWeights] = ModelWeights
    gpu = 0
    one_memory = True
    primed = False
    graphs: DeferredGraphs | None = None

    def __init__(self, start: StartEngine, ranks: Ranks) -> None:
        self._start = start
        self._ranks = ranks
        self._kv = MemoryArena("prism-kv", start.kv_bytes * KV_ARENA_SLACK)

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
        """The arena. Raises PrismError(out_of_memory) when SGLang took more than the quota."""
        if self._kv.used > self._start.kv_bytes:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{self._start.model}: the KV cache takes {self._kv.used} bytes, its quota is "
                f"{self._start.kv_bytes}; raise max_memory_pool_size",
            )
        return ArenaKvMemory(self._kv)

    def arenas(self, weights: ModelWeights) -> tuple[int, int]:
        """Both lie in arenas."""
        return weights.arena.fd, self._kv.fd
