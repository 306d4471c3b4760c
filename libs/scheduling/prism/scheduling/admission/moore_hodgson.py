"""One queue for all models of a GPU: as many first tokens on time as can be, and nobody waits for ever.

The order in which requests are released:

1. Those that have waited beyond their bound, oldest first. The bound is `patience` times the request's
   objective. While there are enough of them to keep the GPU busy (it is overloaded then, and no order keeps
   every bound) they get `overaged_share` of its prefill time, and the rest goes to those who can be on time:
   a request beyond its bound waits only for older ones of its kind, at that share of the GPU's speed.
2. The largest set that can be on time (Moore-Hodgson), by due time. Priorities and weights decide who is
   given up: lower priorities first, then the longest prefill for its weight. With equal ones the set is the
   largest there is.
3. The late ones, higher priorities first, then the longest wait times weight (oldest first when equal).

Priorities and weights have no say in 1, so they move nobody beyond the bound. Requests of engines that can't
take any now don't compete. See `release` for what bounds a release.

Source of the idea: Prism (arXiv 2505.04021), algorithm 2, which leaves open what happens to late requests.
"""

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop
from itertools import accumulate
from math import inf
from operator import sub

import msgspec
import numpy as np

from prism.scheduling.admission.decode_room import DecodeRoom
from prism.scheduling.admission.on_time import late_positions
from prism.scheduling.admission.policy import Admission, EngineCapacity, GpuWork, QueuedRequest
from prism.scheduling.admission.release import (
    FULL,
    HELD,
    ONCE_OVERAGED,
    STARTED,
    STOPPED,
    TWICE_OVERAGED,
    PrefillBudget,
    Release,
)

VECTORISED_FROM = 64
"""From so many requests on, arrays are faster than loops."""


class Bounds(msgspec.Struct, frozen=True):
    """How long a request may wait: `patience` times its objective, which is taken as `unpromised_slo_s`
    seconds where it has none. `overaged_share` is the share of prefill time for those who have waited
    longer; 1 puts them before everybody else whatever that costs."""

    patience: float = 8.0
    unpromised_slo_s: float = 10.0
    overaged_share: float = 0.5

    def bound_s(self, request: QueuedRequest) -> float:
        """How long `request` may wait."""
        slo_s = request.ttft_slo_s
        return self.patience * (slo_s if slo_s < inf else self.unpromised_slo_s)

    def exceeded(self, request: QueuedRequest, now: float) -> bool:
        """Whether it has waited beyond its bound."""
        slo = request.ttft_slo_s if request.ttft_slo_s < inf else self.unpromised_slo_s
        return now - request.arrival_s >= self.patience * slo


Overaged = list[tuple[float, str, QueuedRequest]]
"""Arrival, rid, request."""

Candidates = tuple[list[QueuedRequest], list[float], list[float], Overaged]
"""Requests that may start, sorted by due time, then arrival, then rid; the seconds of prefill and the due
time of each; and those beyond their bound, oldest first."""


class MooreHodgsonAdmission:
    """See the module. O(n log n) in the length of the queue, O(1) while the GPU has prefill enough."""

    def __init__(self, bounds: Bounds | None = None, budget: PrefillBudget | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._budget = budget or PrefillBudget()

    def select(
        self,
        queue: Sequence[QueuedRequest],
        engines: Mapping[str, EngineCapacity],
        gpu: GpuWork,
        now: float,
    ) -> Admission:
        """See AdmissionPolicy. Requests whose deadline has passed are never started."""
        full_until = gpu.prefill_until_s - self._budget.lookahead_s
        if full_until >= now or not queue:
            return Admission([], full_until if queue else None)
        room = DecodeRoom(engines, gpu)
        release = Release(engines, gpu, now, self._budget, room)
        if len(queue) == 1 and release.offer_alive(queue[0]) is STARTED:
            return release.admission()
        gather = _few if len(queue) < VECTORISED_FROM else _many
        requests, seconds, dues, overaged = gather(queue, engines, now, self._bounds, room)
        if overaged:
            release.engines_kept_free = 1
            if not self._release_overaged(overaged, release, gpu, now):
                return release.admission()
        late = _late(release.until_s, requests, seconds, dues) if requests else []
        kept = requests
        if late:
            given_up = set(late)
            on_time = [position for position in range(len(requests)) if position not in given_up]
            kept = [requests[position] for position in on_time]
            seconds = [seconds[position] for position in on_time]
            dues = [dues[position] for position in on_time]
        if not self._release_on_time(kept, seconds, dues, release, now):
            return release.admission()
        for _, _, request in overaged:
            if release.offer(request) in STOPPED:
                return release.admission()
        if late:
            for request in _by_wait([requests[position] for position in late], now):
                if release.offer(request) in STOPPED:
                    break
        return release.admission()

    def _release_overaged(self, overaged: Overaged, release: Release, gpu: GpuWork, now: float) -> bool:
        """Offer those that go first now, and drop them from the list. False when nothing more can start."""
        share = self._bounds.overaged_share
        all_s, theirs_s = gpu.recent_prefill_s, gpu.recent_overaged_s
        offered = 0
        for _, _, request in overaged:
            if theirs_s > share * all_s:
                break
            before = release.until_s
            twice = now - request.arrival_s >= 2.0 * self._bounds.bound_s(request)
            overage = TWICE_OVERAGED if twice else ONCE_OVERAGED
            if release.offer(request, urgent=True, overaged=overage) is FULL:
                return False
            all_s += release.until_s - before
            theirs_s += release.until_s - before
            offered += 1
        del overaged[:offered]
        return True

    def _release_on_time(
        self,
        kept: Sequence[QueuedRequest],
        seconds: Sequence[float],
        dues: Sequence[float],
        release: Release,
        now: float,
    ) -> bool:
        """Offer those that can be on time. False when nothing more can start."""
        urgent = False
        for position, request in enumerate(kept):
            outcome = release.offer(request, urgent=urgent)
            if outcome is HELD:
                ends = accumulate(seconds[position:], initial=release.until_s)
                next(ends)
                slack_s = min(map(sub, dues[position:], ends)) - self._budget.lookahead_s
                if slack_s > 0:
                    release.look_again(now + slack_s)
                    return False
                urgent = True
                outcome = release.offer(request, urgent=True)
            if outcome is FULL:
                return False
        return True


def _few(
    queue: Sequence[QueuedRequest],
    engines: Mapping[str, EngineCapacity],
    now: float,
    bounds: Bounds,
    room: DecodeRoom,
) -> Candidates:
    rows: list[tuple[float, float, str, float, QueuedRequest]] = []
    overaged: Overaged = []
    for request in queue:
        engine = engines.get(request.model)
        if (
            engine is None
            or not engine.accepting
            or engine.running >= engine.max_running
            or request.deadline_s <= now
        ):
            continue
        arrival = request.arrival_s
        slo = request.ttft_slo_s
        if now - arrival >= bounds.patience * (slo if slo < inf else bounds.unpromised_slo_s):
            overaged.append((arrival, request.rid, request))
        elif engine.running or room.has_room(engine):
            seconds = engine.prefill_fixed_s + request.prompt_tokens / engine.prefill_tokens_per_s
            rows.append((arrival + slo, arrival, request.rid, seconds, request))
    rows.sort()
    overaged.sort()
    return [row[4] for row in rows], [row[3] for row in rows], [row[0] for row in rows], overaged


def _many(
    queue: Sequence[QueuedRequest],
    engines: Mapping[str, EngineCapacity],
    now: float,
    bounds: Bounds,
    room: DecodeRoom,
) -> Candidates:
    numbers: dict[str, int] = {}
    rates: list[float] = []
    fixed: list[float] = []
    shut: list[bool] = []
    for model, engine in engines.items():
        if engine.accepting and engine.running < engine.max_running:
            numbers[model] = len(rates)
            shut.append(not (engine.running or room.has_room(engine)))
            rates.append(engine.prefill_tokens_per_s)
            fixed.append(engine.prefill_fixed_s)
    number = np.array([numbers.get(request.model, -1) for request in queue])
    arrival = np.array([request.arrival_s for request in queue])
    slo = np.array([request.ttft_slo_s for request in queue])
    deadline = np.array([request.deadline_s for request in queue])
    able = (number >= 0) & (deadline > now)
    old = now - arrival >= bounds.patience * np.where(slo < inf, slo, bounds.unpromised_slo_s)
    overaged = [
        (queue[index].arrival_s, queue[index].rid, queue[index])
        for index in np.flatnonzero(old & able).tolist()
    ]
    overaged.sort()
    if any(shut):
        able &= ~np.array([*shut, True])[number]
    index = np.flatnonzero(able & ~old)
    if not len(index):
        return [], [], [], overaged
    due = arrival + slo
    index = index[np.argsort(due[index])]
    due = due[index]
    if bool((due[1:] == due[:-1]).any()):
        keyed = zip(due.tolist(), arrival[index].tolist(), index.tolist(), strict=True)
        index = np.array(
            [row[3] for row in sorted((d, a, queue[position].rid, position) for d, a, position in keyed)]
        )
    requests = [queue[position] for position in index.tolist()]
    tokens = np.array([request.prompt_tokens for request in requests])
    number = number[index]
    seconds = np.array(fixed)[number] + tokens / np.array(rates)[number]
    return requests, seconds.tolist(), due.tolist(), overaged


def _late(
    start_s: float, requests: Sequence[QueuedRequest], seconds: Sequence[float], dues: Sequence[float]
) -> list[int]:
    """Positions of those that can't all be on time, and are given up for the others."""
    at = start_s
    for job_s, due in zip(seconds, dues, strict=True):
        at += job_s
        if at > due:
            break
    else:
        return []
    priorities = [request.priority for request in requests]
    weights = [request.weight for request in requests]
    if len(requests) < VECTORISED_FROM:
        keyed = [
            (priority, -job_s / weight, position)
            for position, (priority, job_s, weight) in enumerate(
                zip(priorities, seconds, weights, strict=True)
            )
        ]
        keyed.sort()
        first_out = [row[2] for row in keyed]
    else:
        costs = np.array(seconds) / np.array(weights)
        plain = min(priorities) == max(priorities)
        order = np.argsort(-costs, kind="stable") if plain else np.lexsort((-costs, np.array(priorities)))
        first_out = order.tolist()
    return late_positions(start_s, seconds, dues, first_out)


def _by_wait(late: list[QueuedRequest], now: float) -> Iterator[QueuedRequest]:
    """Higher priorities first, then the longest wait times weight."""
    heap = [
        (-request.priority, (request.arrival_s - now) * request.weight, request.rid, request)
        for request in late
    ]
    # A heap: most are never asked for.
    heapify(heap)
    while heap:
        yield heappop(heap)[3]
