"""An engine's KV cache on a GPU: pages of kvcached, mapped as they are used, bounded by a quota."""

import logging
from typing import Any

import torch

from prism.common.errors import ErrorCode, PrismError

log = logging.getLogger(__name__)


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
        self._revision = 0
        self.set_limit(limit_bytes)

    @property
    def mapped_bytes(self) -> int:
        """Memory behind the pool now, as kvcached counts it."""
        return int(self._pool.get_mapped_memory_size())

    def set_limit(self, limit_bytes: int) -> None:
        """Bound what may be mapped. Raises PrismError(overloaded) when more than that is in use."""
        from kvcached.control import set_instance_memory_limit

        self._revision += 1
        outcome = set_instance_memory_limit(limit_bytes, revision=self._revision)
        if outcome["status"] != "applied":
            raise PrismError(
                ErrorCode.OVERLOADED,
                f"the KV quota of {limit_bytes} bytes was {outcome['status']}: {outcome['reason']}",
                retry=True,
            )

    def held_tokens(self, scheduler: Any) -> int:
        """Tokens of requests, without cached prefixes that could be evicted."""
        in_use = int(self._pool._get_num_alloced_blocks()) - len(self._pool.null_block or [])
        return max(0, in_use - int(scheduler.tree_cache.evictable_size()))

    def unmap(self) -> None:
        """Give every page back, that of the padding slot too. The pool is empty of requests and prefixes."""
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
        """Make the pool usable again: its padding slot gets memory, everything else as it is used."""
        if self._pool.null_block is None:
            self._pool._reserve_null_block()
