"""An engine's KV cache on a GPU: pages of kvcached, mapped as they are used, bounded by a quota."""

import logging
from typing import Any

import torch

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import retraction
from prism.gpu_worker.engine.kv_slots import KvSlots

log = logging.getLogger(__name__)

# Where SGLang writes the KV cache of tokens that only fill a batch up.
PADDING_SLOT = 0


class KvcachedMemory:
    """The elastic KV pool of a scheduler in this process. `limit_bytes` is its quota.

    Raises PrismError(internal) when SGLang runs without kvcached's patch, which only warns of it.
    """

    def __init__(self, scheduler: Any, limit_bytes: int) -> None:
        allocator = scheduler.token_to_kv_pool_allocator
        pool = getattr(allocator, "kvcached_allocator", None)
        if pool is None or not type(allocator).__name__.startswith("Elastic"):
            raise PrismError(
                ErrorCode.INTERNAL,
                f"the KV cache is SGLang's own ({type(allocator).__name__}), not kvcached's: is kvcached "
                "installed with its kvcached_autopatch.pth in site-packages? "
                "`python -m prism.gpu_worker doctor` tells",
            )
        self._pool = pool
        self._scheduler = scheduler
        self._slots = KvSlots(allocator, pool)
        self._revision = 0
        self.overhead_bytes = 0
        self.page_bytes = int(pool.page_size) * int(pool.num_layers) * int(pool.num_kv_buffers)
        self._limit_bytes = limit_bytes
        outcome = self._apply(limit_bytes)
        if outcome["status"] != "applied":
            raise PrismError(
                ErrorCode.OVERLOADED,
                f"the KV quota of {limit_bytes / 1e6:.1f} MB was {outcome['status']}: {outcome['reason']}. "
                f"Pages have {self.page_bytes / 1e6:.1f} MB: raise max_memory_pool_size where that is more",
                retry=True,
            )

    @property
    def mapped_bytes(self) -> int:
        """Memory behind the pool now, as kvcached counts it."""
        return int(self._pool.get_mapped_memory_size())

    @property
    def limit_tokens(self) -> int:
        """Tokens in whole pages within the limit, less the padding slot."""
        pages = self._limit_bytes // self.page_bytes
        most = int(self._scheduler.max_total_num_tokens)
        return max(0, min(pages * self._tokens_per_page, most) - 1)

    @property
    def _tokens_per_page(self) -> int:
        # SGLang runs with pages of one token, which are kvcached's blocks.
        return int(self._pool.page_size) // int(self._pool.block_mem_size)

    def _apply(self, limit_bytes: int) -> dict[str, Any]:
        from kvcached.control import set_instance_memory_limit
        from kvcached.errors import QuarantinedResizeError

        self._revision += 1
        try:
            outcome: dict[str, Any] = set_instance_memory_limit(limit_bytes, revision=self._revision)
        except QuarantinedResizeError as error:
            mapped = self.mapped_bytes
            return {"status": "rejected", "reason": str(error), "mapped_bytes": mapped, "overage_bytes": 0}
        return outcome

    def set_limit(self, limit_bytes: int) -> tuple[int, int]:
        """See KvMemory. A page goes when the last of its tokens goes, so that more prefixes than the quota
        asks for may have to be evicted: kvcached moves no tokens."""
        cache = self._scheduler.tree_cache
        before = self._limit_bytes
        self._slots.give_back()
        outcome = self._apply(limit_bytes)
        while outcome["status"] == "deferred" and cache.evictable_size():
            retraction.evict(self._scheduler, max(self._tokens_per_page, self._tokens_of(outcome)))
            outcome = self._apply(limit_bytes)
        retracted = 0
        if outcome["status"] == "deferred":

            def enough() -> bool:
                nonlocal outcome
                retraction.evict(self._scheduler, int(cache.evictable_size()))
                outcome = self._apply(limit_bytes)
                return bool(outcome["status"] != "deferred")

            retracted = retraction.retract_lowest(self._scheduler, enough)
        # Pages that kvcached keeps in reserve have memory behind them.
        self._pool.trim()
        if outcome["status"] == "applied":
            self._limit_bytes = limit_bytes
        else:
            # What is mapped stays within what was allowed before, and goes no higher from here.
            held = min(before, max(limit_bytes, int(outcome["mapped_bytes"])))
            log.info("KV quota %s: %s, %d bytes hold", outcome["status"], outcome["reason"], held)
            self._limit_bytes = held
            self._apply(held)
        return self._limit_bytes, retracted

    def _tokens_of(self, outcome: dict[str, Any]) -> int:
        return -(-int(outcome["overage_bytes"]) // self.page_bytes) * self._tokens_per_page

    def held_tokens(self) -> int:
        """Tokens of requests, without cached prefixes that could be evicted."""
        in_use = self._slots.used - len(self._pool.null_block or [])
        return max(0, in_use - int(self._scheduler.tree_cache.evictable_size()))

    def unmap(self) -> None:
        """Give every page back, that of the padding slot too. The pool is empty of requests and prefixes."""
        self._slots.forget()
        self._pool.reserve_null_block = False
        self._pool.clear()
        self._pool.null_block = None
        self._pool.reserve_null_block = True
        torch.cuda.empty_cache()
        log.debug(
            "asleep: kvcached has %d MB mapped, torch holds %d MB, of which %d MB are in use",
            self.mapped_bytes >> 20,
            torch.cuda.memory_reserved() >> 20,
            torch.cuda.memory_allocated() >> 20,
        )

    def map(self) -> None:
        """Make the pool usable again: its padding slot gets memory, everything else as it is used.

        Raises PrismError(out_of_memory, retry) when the GPU has no page left: kvcached's own way waits until
        there is one.
        """
        if self._pool.null_block is not None:
            return
        taken = self._pool._alloc(1, _skip_wait=True)
        self._slots.changed()
        if taken is None:
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"the GPU has too little free memory for a page of KV cache, {self.page_bytes / 1e6:.1f} MB",
                retry=True,
            )
        if taken != [PADDING_SLOT]:
            self._pool.free(taken)
            raise PrismError(ErrorCode.INTERNAL, f"kvcached gave slot {taken} for padding, not the first")
        self._pool.null_block = taken
