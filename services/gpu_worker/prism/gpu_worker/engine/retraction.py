"""Taking KV memory back from a scheduler that works: prefixes first, then requests, which go on later.

Between two steps of SGLang's scheduler, as its own `pause_generation` does it: a retracted request gives up
its memory, waits in the scheduler's queue with what it has generated, and is prefilled again from there.
"""

from collections.abc import Callable
from typing import Any


def evict(scheduler: Any, tokens: int) -> None:
    """Forget cached prefixes of so many tokens, least recently used first, as far as there are any."""
    if tokens > 0:
        # The host of this scheduler has imported it; tests of what calls this need not.
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        scheduler.tree_cache.evict(EvictParams(num_tokens=tokens))


def retract_lowest(scheduler: Any, enough: Callable[[], bool]) -> int:
    """Retract decoding requests, lowest priority first and the youngest of those, until `enough`. A request
    whose prompt is being prefilled in chunks stays: it decodes soon. Returns how many were retracted."""
    _settle(scheduler)
    batch = scheduler.running_batch
    batch.filter_batch()
    places = sorted(
        range(len(batch.reqs)),
        key=lambda place: (
            batch.reqs[place].priority or 0,
            -batch.reqs[place].time_stats.wait_queue_entry_time,
        ),
    )
    retracted = []
    for place in places:
        if enough():
            break
        batch.release_req(place, 0, scheduler.server_args)
        retracted.append(place)
    requests = [batch.reqs[place] for place in retracted]
    if requests:
        batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i not in retracted])
        batch.batch_is_full = False
    for request in requests:
        scheduler._add_request_to_queue(request, is_retracted=True)
    return len(requests)


def _settle(scheduler: Any) -> None:
    """Have everything that decodes in the running batch, with all results processed."""
    last = scheduler.last_batch
    if scheduler.enable_overlap and last:
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
    if last and last.forward_mode.is_extend():
        chunked = [request for request in (scheduler.chunked_req, last.chunked_req) if request is not None]
        last.filter_batch(chunked_req_to_exclude=chunked)
        if not last.is_empty():
            if scheduler.running_batch.is_empty():
                scheduler.running_batch = last
            else:
                scheduler.running_batch.merge_batch(last)
    scheduler.last_batch = None
    scheduler.cur_batch = None
