"""What an engine of several ranks needs changed on GPUs: kvcached's pools and SGLang's sharded embedding."""

from typing import Any

import torch

from prism.gpu_worker.engine.uncompiled import plain


def prepare(gpu: int) -> None:
    """Before the scheduler of the rank on `gpu` is made; SGLang has been imported."""
    _map_own_pages()
    _begin_pools_on(gpu)
    _shard_embedding_uncompiled()


def _map_own_pages() -> None:
    """Have each rank map the pages of its own pool. kvcached would have every rank map those of all others,
    over sockets; but SGLang's ranks each run the same scheduler, and come to the same pages by themselves."""
    from kvcached.integration.sglang import interfaces

    init = interfaces.init_kvcached

    def init_alone(*, async_sched: bool = False, **_: Any) -> None:
        init(async_sched=async_sched)

    interfaces.init_kvcached = init_alone


def _begin_pools_on(gpu: int) -> None:
    """kvcached prepares a pool in a thread of its own, which would be on GPU 0: every other rank would hold a
    context there (390 MiB) that nobody counts."""
    from kvcached.kv_cache_manager import KVCacheManager

    begin = KVCacheManager._post_init

    def begin_here(manager: Any) -> None:
        torch.cuda.set_device(gpu)
        begin(manager)

    KVCacheManager._post_init = begin_here


def _shard_embedding_uncompiled() -> None:
    """SGLang compiles a dozen operations on token ids, which takes longer than all else of a start: 13 s in
    each new process, 41 s on a new host (H200). In a CUDA graph they cost 15 us a step uncompiled."""
    from sglang.srt.layers import vocab_parallel_embedding

    mask = plain(vocab_parallel_embedding.get_masked_input_and_mask)
    vocab_parallel_embedding.get_masked_input_and_mask = mask
