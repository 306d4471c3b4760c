"""An engine's KV cache on a CPU: SGLang's token slots in an arena, of which a quota bounds the first so many.

Address space for the largest quota is reserved once; memory comes as slots are written to. The quota is a
number: slots up to it can be handed out, those beyond are withheld, and the pages behind them are given back
to the kernel. SGLang keeps K and V of each layer in a tensor of its own, with a token's bytes at the same
place in all of them, so slots at the end of the range are what whole pages can be made of: lowering the
quota moves tokens that lie beyond it into free slots below. A page at the edge of each tensor may be only
half used; `overhead_bytes` has room for those, and for SGLang's table of requests.
"""

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

from prism.gpu_worker.engine import retraction
from prism.gpu_worker.engine.arena import PAGE, MemoryArena

POOLS = ("k_buffer", "v_buffer", "kv_buffer")


class BoundedSlots(TokenToKVPoolAllocator):  # type: ignore[misc]
    """SGLang's allocator, of whose slots 1 to `size` only those up to `limit` can be had."""

    limit: int
    free_pages: torch.Tensor
    release_pages: torch.Tensor

    @classmethod
    def bound(cls, allocator: Any) -> "BoundedSlots":
        """Make this of an allocator of SGLang's, with all slots to be had."""
        if type(allocator) is not TokenToKVPoolAllocator:
            raise TypeError(f"quotas need SGLang's token allocator, not {type(allocator).__name__}")
        allocator.__class__ = cls
        allocator.limit = allocator.size
        bounded: BoundedSlots = allocator
        return bounded

    def clear(self) -> None:
        """All slots within the limit are free."""
        super().clear()
        self.free_pages = self.free_pages[: self.limit]

    @property
    def free_slots(self) -> torch.Tensor:
        """All that are free."""
        return torch.cat((self.free_pages, self.release_pages))

    @free_slots.setter
    def free_slots(self, slots: torch.Tensor) -> None:
        self.free_pages = slots
        self.release_pages = slots[:0]


class ArenaKvMemory:
    """A KV cache that lies in an arena. See the module."""

    page_bytes = PAGE

    def __init__(self, arena: MemoryArena, scheduler: Any) -> None:
        self._arena = arena
        self._scheduler = scheduler
        self._slots = BoundedSlots.bound(scheduler.token_to_kv_pool_allocator)
        pool = self._slots.get_kvcache()
        self._tensors: list[torch.Tensor] = [
            tensor for name in POOLS for tensor in getattr(pool, name, None) or []
        ]
        self._slot_bytes = sum(tensor[0].nbytes for tensor in self._tensors)
        elsewhere = arena.used - sum(tensor.nbytes for tensor in self._tensors)
        self.overhead_bytes = elsewhere + self._slot_bytes + 2 * PAGE * len(self._tensors)
        self.map = arena.map
        self.unmap = arena.unmap

    @property
    def limit_tokens(self) -> int:
        """Tokens that the quota has room for."""
        return self._slots.limit

    def held_tokens(self) -> int:
        """Tokens of requests, without cached prefixes that could be evicted."""
        evictable = int(self._scheduler.tree_cache.evictable_size())
        return self._slots.limit - int(self._slots.available_size()) - evictable

    def set_limit(self, limit_bytes: int) -> tuple[int, int]:
        """See KvMemory."""
        wanted = self._tokens_within(limit_bytes)
        before = self._slots.limit
        retracted = 0
        if wanted >= before:
            fresh = torch.arange(before + 1, wanted + 1, dtype=torch.int64)
            self._slots.free_slots = torch.cat((self._slots.free_slots, fresh))
            self._bound(wanted)
            return limit_bytes, 0
        retraction.evict(self._scheduler, self._in_use() - wanted)
        if self._in_use() > wanted:
            retracted = retraction.retract_lowest(self._scheduler, lambda: self._evicted_to(wanted))
            self._evicted_to(wanted)
        limit = max(wanted, self._in_use())
        self._move_below(limit)
        free = self._slots.free_slots
        self._slots.free_slots = free[free <= limit]
        self._bound(limit)
        self._give_back_beyond(limit)
        return max(limit_bytes, self._bytes_for(limit)), retracted

    def _evicted_to(self, tokens: int) -> bool:
        retraction.evict(self._scheduler, self._in_use() - tokens)
        return self._in_use() <= tokens

    def _in_use(self) -> int:
        return self._slots.limit - int(self._slots.available_size())

    def _tokens_within(self, limit_bytes: int) -> int:
        if limit_bytes >= self._arena.used:
            return int(self._slots.size)
        fitting: int = (limit_bytes - self.overhead_bytes) // self._slot_bytes
        return max(0, min(int(self._slots.size), fitting))

    def _bytes_for(self, tokens: int) -> int:
        nbytes: int = self.overhead_bytes + tokens * self._slot_bytes
        return min(self._arena.used, nbytes)

    def _bound(self, limit: int) -> None:
        self._slots.limit = limit
        # SGLang counts its slots whenever it is idle, and takes what is withheld for lost.
        scheduler = self._scheduler
        scheduler.invariant_checker.max_total_num_tokens = limit
        object.__setattr__(scheduler.pool_stats_observer, "max_total_num_tokens", max(1, limit))

    def _move_below(self, limit: int) -> None:
        """Move what lies in slots beyond `limit` into free ones up to it; there are enough."""
        free = self._slots.free_slots
        taken = torch.ones(self._slots.size + 1, dtype=torch.bool)
        taken[0] = False
        taken[self._slots.limit + 1 :] = False
        taken[free] = False
        beyond = torch.nonzero(taken[limit + 1 :]).flatten() + limit + 1
        if not len(beyond):
            return
        below = free[free <= limit]
        places = below[: len(beyond)]
        for tensor in self._tensors:
            tensor[places] = tensor[beyond]
        moved = torch.arange(self._slots.size + 1, dtype=torch.int64)
        moved[beyond] = places
        table = self._scheduler.req_to_token_pool.req_to_token
        table.copy_(moved[table.long()])
        for node in self._nodes():
            node.value = moved[node.value]
        for request in self._requests():
            request.prefix_indices = moved[request.prefix_indices]
        self._slots.free_slots = torch.cat((below[len(beyond) :], free[free > limit], beyond))

    def _nodes(self) -> Iterator[Any]:
        """Every node of the prefix cache that holds slots."""
        waiting = list(self._scheduler.tree_cache.root_node.children.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node

    def _requests(self) -> Iterator[Any]:
        """Every request that may hold slots, once."""
        scheduler = self._scheduler
        seen: dict[int, Any] = {id(request): request for request in scheduler.waiting_queue}
        for batch in (scheduler.running_batch, scheduler.last_batch):
            if batch is not None:
                seen.update((id(request), request) for request in batch.reqs)
        if scheduler.chunked_req is not None:
            seen[id(scheduler.chunked_req)] = scheduler.chunked_req
        yield from (request for request in seen.values() if request.prefix_indices is not None)

    def _give_back_beyond(self, limit: int) -> None:
        for tensor in self._tensors:
            begin = tensor.data_ptr() - self._arena.address
            slot = tensor[0].nbytes
            self._arena.give_back(begin + (limit + 1) * slot, begin + tensor.nbytes)
