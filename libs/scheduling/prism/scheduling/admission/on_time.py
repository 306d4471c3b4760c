"""Moore-Hodgson: the largest set of jobs that one machine can finish by their due times.

Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs" (1968), with
Hodgson's simplification: walk the jobs by due time; whenever the time run up exceeds the due time at hand,
give up one of the jobs so far. Giving up the longest leaves the most jobs on time; with weights, where the
exact answer is NP-hard, the longest for its weight is given up.
"""

from collections.abc import Sequence
from heapq import heappop, heappush, heappushpop


def late_positions(
    start_s: float, seconds: Sequence[float], dues: Sequence[float], first_out: Sequence[int]
) -> list[int]:
    """Which jobs to give up. Jobs stand in order of their due times, and take `seconds` each from `start_s`
    on; `first_out` lists their positions, the first to give up in front. O(n log n).

    A job that alone would be late already is given up, and nobody makes room for it.
    """
    rank = [0] * len(first_out)
    for order, position in enumerate(first_out):
        rank[position] = order
    late: list[int] = []
    kept: list[int] = []
    at = start_s
    for order, job_s, due in zip(rank, seconds, dues, strict=True):
        if at + job_s <= due:
            heappush(kept, order)
            at += job_s
            continue
        if start_s + job_s > due:
            late.append(first_out[order])
            continue
        given_up = first_out[heappushpop(kept, order)]
        late.append(given_up)
        at += job_s - seconds[given_up]
        while at > due and kept:
            given_up = first_out[heappop(kept)]
            late.append(given_up)
            at = at - seconds[given_up] if kept else start_s
    return late
