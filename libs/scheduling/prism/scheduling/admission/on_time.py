"""Moore-Hodgson: the largest set of jobs that one machine can finish by their due times.

Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs" (1968), with
Hodgson's simplification: walk the jobs by due time; whenever the time run up exceeds the due time at hand,
give up one of the jobs so far. Giving up the longest leaves the most jobs on time; with weights, where the
exact answer is NP-hard, the longest for its weight is given up.

Jobs may come in families, each with a setup that is paid once, with the first job of the family (and stays
paid when that job is given up).
With setups the exact answer is NP-hard too (Bruno and Downey, 1978, for any number of families); what comes
out is on time all the same, and the largest such set where there are no setups.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heappushpop

HEAPIFY_FROM = 8
"""Making a heap anew takes less than adding to it one by one when so much of it, one in this many, is new."""


def late_positions(
    start_s: float,
    seconds: Sequence[float],
    dues: Sequence[float],
    first_out: Sequence[int],
    families: Sequence[int] = (),
    setups: Sequence[float] = (),
) -> list[int]:
    """Which jobs to give up. Jobs stand in order of their due times, and take `seconds` each from `start_s`
    on; `first_out` lists their positions, the first to give up in front. `families` says of each job to which
    of the `setups` it belongs; without, there are none. O(n log n).

    A job that alone would be late already is given up, and nobody makes room for it.
    """
    if not setups:
        families, setups = (0,) * len(seconds), (0.0,)
    rank = [0] * len(first_out)
    for order, position in enumerate(first_out):
        rank[position] = order
    late: list[int] = []
    # Jobs on time since somebody was given up last wait beside the heap: most are never looked at again.
    kept: list[int] = []
    fresh: list[int] = []
    owed = list(setups)
    owing = any(owed)
    at = start_s
    for order, job_s, due, family in zip(rank, seconds, dues, families, strict=True):
        ends = at + owed[family] + job_s if owing else at + job_s
        if ends <= due:
            fresh.append(order)
            at = ends
            if owing:
                owed[family] = 0.0
                owing = any(owed)
            continue
        if start_s + setups[family] + job_s > due:
            late.append(first_out[order])
            continue
        if len(fresh) * HEAPIFY_FROM > len(kept):
            kept += fresh
            heapify(kept)
        else:
            for one in fresh:
                heappush(kept, one)
        fresh.clear()
        out = heappushpop(kept, order)
        late.append(first_out[out])
        if out == order:
            ends = at
        else:
            owed[family] = 0.0
            owing = any(owed)
            ends -= seconds[first_out[out]]
        while ends > due and kept:
            out = heappop(kept)
            late.append(first_out[out])
            ends -= seconds[first_out[out]]
        if not kept:
            owed, ends = list(setups), start_s
            owing = any(owed)
        at = ends
    return late
