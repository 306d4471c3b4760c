"""Quotas under kvcached: what is evicted and retracted for a lower one, and what is confirmed. kvcached
itself, which runs on GPUs alone, is stood in for by its rule: a limit holds once the pages in use are within
it."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker.engine import retraction
from prism.gpu_worker.engine.kvcached_memory import KvcachedMemory

pytestmark = pytest.mark.core

PAGE = 100
TOKENS_PER_PAGE = 10


class Quarantined(ValueError):
    """kvcached's QuarantinedResizeError."""


class Pool:
    """kvcached's manager: pages in use, by prefixes and by requests."""

    page_size = PAGE
    num_layers = 1
    num_kv_buffers = 1
    block_mem_size = PAGE // TOKENS_PER_PAGE
    null_block: list[int] | None = None

    def __init__(self) -> None:
        self.gives: list[list[int] | None] = [[0]]
        self.freed: list[int] = []
        self.prefix_pages = 0
        self.request_pages: list[int] = []
        self.limits: list[int] = []
        self.trims = 0
        self.quarantined = False

    def in_use(self) -> int:
        return self.prefix_pages + sum(self.request_pages)

    def get_mapped_memory_size(self) -> float:
        return self.in_use() * PAGE

    def _alloc(self, count: int, *, _skip_wait: bool) -> list[int] | None:
        assert (count, _skip_wait) == (1, True), "what must not wait for memory"
        return self.gives.pop(0)

    def free(self, slots: list[int]) -> None:
        self.freed += slots

    def trim(self) -> None:
        self.trims += 1

    def set_limit(self, limit_bytes: int, *, revision: int) -> dict[str, Any]:
        assert revision == len(self.limits) + 1, "revisions count up"
        self.limits.append(limit_bytes)
        if self.quarantined:
            raise Quarantined("quarantined pages")
        over = max(0, self.in_use() - limit_bytes // PAGE)
        status = "deferred" if over else "applied"
        return {
            "status": status,
            "reason": "inuse_capacity_above_limit" if over else "",
            "mapped_bytes": self.in_use() * PAGE,
            "overage_bytes": over * PAGE,
        }


class ElasticAllocator:
    """What kvcached's patch puts in the place of SGLang's allocator."""

    device = "cpu"
    size = 1000

    def __init__(self, pool: Pool) -> None:
        self.kvcached_allocator = pool
        self.alloc: Any = None

    def available_size(self) -> int:
        raise AssertionError("ours is in its place")

    def free(self, index: Any) -> None: ...

    def clear(self) -> None: ...


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """A pool that kvcached's control knows; requests are retracted last to first."""
    made = Pool()
    control, errors = ModuleType("kvcached.control"), ModuleType("kvcached.errors")
    control.set_instance_memory_limit = made.set_limit  # type: ignore[attr-defined]
    errors.QuarantinedResizeError = Quarantined  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvcached", ModuleType("kvcached"))
    monkeypatch.setitem(sys.modules, "kvcached.control", control)
    monkeypatch.setitem(sys.modules, "kvcached.errors", errors)

    def evict(_: Any, tokens: int) -> None:
        made.prefix_pages = max(0, made.prefix_pages - tokens // TOKENS_PER_PAGE)

    def retract_lowest(_: Any, enough: Any) -> int:
        retracted = 0
        while made.request_pages and not enough():
            made.request_pages.pop()
            retracted += 1
        enough()
        return retracted

    monkeypatch.setattr(retraction, "evict", evict)
    monkeypatch.setattr(retraction, "retract_lowest", retract_lowest)
    return made


def memory(pool: Pool, limit: int) -> KvcachedMemory:
    cache = SimpleNamespace(evictable_size=lambda: pool.prefix_pages * TOKENS_PER_PAGE)
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=ElasticAllocator(pool), tree_cache=cache, max_total_num_tokens=10_000
    )
    return KvcachedMemory(scheduler, limit)


def test_a_quota_is_raised_and_lowered_at_once_while_nothing_is_in_the_way(pool: Pool) -> None:
    kv = memory(pool, 1000)
    assert kv.limit_tokens == 99, "one is the padding slot"
    assert kv.set_limit(500) == (500, 0)
    assert kv.set_limit(2000) == (2000, 0)
    assert kv.limit_tokens == 199
    assert pool.trims == 2


def test_prefixes_go_first_and_no_more_than_must(pool: Pool) -> None:
    kv = memory(pool, 1000)
    pool.prefix_pages, pool.request_pages = 5, [2, 2]
    assert kv.set_limit(600) == (600, 0)
    assert (pool.prefix_pages, pool.request_pages) == (2, [2, 2])


def test_then_requests(pool: Pool) -> None:
    kv = memory(pool, 1000)
    pool.prefix_pages, pool.request_pages = 3, [2, 2, 2]
    assert kv.set_limit(400) == (400, 1)
    assert (pool.prefix_pages, pool.request_pages) == (0, [2, 2])


def test_what_cannot_be_freed_is_confirmed_as_held(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = memory(pool, 1000)
    pool.request_pages = [7]
    monkeypatch.setattr(retraction, "retract_lowest", lambda *_: 0)
    assert kv.set_limit(400) == (700, 0)
    assert pool.limits[-1] == 700


def test_a_refusal_leaves_the_quota_as_it_was(pool: Pool) -> None:
    kv = memory(pool, 1000)
    pool.quarantined = True
    assert kv.set_limit(2000) == (1000, 0)


def test_sglang_s_own_allocator_is_told_apart() -> None:
    scheduler = SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace())
    with pytest.raises(PrismError, match="kvcached_autopatch"):
        KvcachedMemory(scheduler, 1000)


def test_a_pool_that_wakes_has_its_padding_slot_or_says_that_there_is_no_memory(pool: Pool) -> None:
    kv = memory(pool, 1000)
    pool.gives = [None, [0]]
    with pytest.raises(PrismError) as caught:
        kv.map()
    assert (caught.value.code, caught.value.retry) == (ErrorCode.OUT_OF_MEMORY, True)
    assert pool.null_block is None, "it is tried again"
    kv.map()
    assert pool.null_block == [0]
    kv.map()
    assert not pool.gives, "once it is there nothing is taken"


def test_no_other_slot_is_taken_for_padding(pool: Pool) -> None:
    kv = memory(pool, 1000)
    pool.gives = [[7]]
    with pytest.raises(PrismError, match="slot"):
        kv.map()
    assert (pool.freed, pool.null_block) == ([7], None)
