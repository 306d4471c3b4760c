"""The requests that an admission decision is about, in the order of their due times.

Two forms of the same: loops for few requests, arrays for many. Ties are broken by arrival, then by rid, so
that the order of the queue makes no difference.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf

import msgspec
import numpy as np
from numpy.typing import NDArray

from prism.scheduling.admission.on_time import late_positions
from prism.scheduling.admission.policy import EngineCapacity, QueuedRequest

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Bounds(msgspec.Struct, frozen=True):
    """How long a request may wait: `patience` times its objective, which is taken as `unpromised_slo_s`
    seconds where it has none. `overaged_share` is the share of prefill time for those who have waited
    longer; 1 puts them before everybody else whatever that costs."""

    patience: float = 8.0
    unpromised_slo_s: float = 10.0
    overaged_share: float = 0.5

    def exceeded(self, request: QueuedRequest, now: float, times: float = 1.0) -> bool:
        """Whether it has waited beyond its bound, or so many times that."""
        slo = request.ttft_slo_s if request.ttft_slo_s < inf else self.unpromised_slo_s
        return now - request.arrival_s >= times * self.patience * slo


class Candidates:
    """Requests that may start, by due time, with the seconds of prefill of each; those beyond their bound are
    `overaged`, oldest first, and not among them."""

    __slots__ = ("_dues", "_requests", "_seconds", "count", "overaged")

    def __init__(
        self,
        requests: Sequence[QueuedRequest],
        seconds: Sequence[float],
        dues: Sequence[float],
        overaged: list[QueuedRequest],
    ) -> None:
        self._requests = requests
        self._seconds = seconds
        self._dues = dues
        self.count = len(dues)
        self.overaged = overaged

    def request(self, position: int) -> QueuedRequest:
        """The one at this position."""
        return self._requests[position]

    def split(self, start_s: float) -> tuple[Sequence[int], Sequence[int]]:
        """Positions of those that can all be on time when prefill begins at `start_s`, and of those that are
        given up for them."""
        at = start_s
        for job_s, due in zip(self._seconds, self._dues, strict=True):
            at += job_s
            if at > due:
                break
        else:
            return range(self.count), ()
        keyed = [
            (request.priority, -job_s / request.weight, position)
            for position, request, job_s in zip(range(self.count), self._requests, self._seconds, strict=True)
        ]
        keyed.sort()
        late = late_positions(start_s, self._seconds, self._dues, [row[2] for row in keyed])
        late.sort()
        return [position for position in range(self.count) if position not in late], late

    def slack(self, positions: Sequence[int], start_s: float) -> float:
        """By how many seconds prefill can begin later than `start_s` with all of these on time."""
        least, at = inf, start_s
        for position in positions:
            at += self._seconds[position]
            least = min(least, self._dues[position] - at)
        return least

    def by_wait(self, late: Sequence[int], now: float) -> Iterable[QueuedRequest]:
        """The late ones: higher priorities first, then the longest wait times weight."""
        keyed = []
        for position in late:
            request = self._requests[position]
            keyed.append((-request.priority, (request.arrival_s - now) * request.weight, position))
        keyed.sort()
        return [self._requests[row[2]] for row in keyed]


class _ManyCandidates(Candidates):
    """The same in arrays; requests are looked up in the queue when they are asked for."""

    __slots__ = ("_due_array", "_index", "_second_array")

    def __init__(
        self,
        queue: Sequence[QueuedRequest],
        index: Integers,
        seconds: Floats,
        dues: Floats,
        overaged: list[QueuedRequest],
    ) -> None:
        super().__init__(queue, seconds.tolist(), dues.tolist(), overaged)
        self._index = index
        self._second_array = seconds
        self._due_array = dues

    def request(self, position: int) -> QueuedRequest:
        return self._requests[int(self._index[position])]

    def split(self, start_s: float) -> tuple[Sequence[int], Sequence[int]]:
        seconds, dues = self._second_array, self._due_array
        if not (start_s + np.cumsum(seconds) > dues).any():
            return range(self.count), ()
        on_time = start_s + seconds <= dues
        rest = np.flatnonzero(on_time)
        if len(rest):
            priority = np.array([request.priority for request in self._requests])[self._index[rest]]
            weight = np.array([request.weight for request in self._requests])[self._index[rest]]
            costs = -seconds[rest] / weight
            one_priority = bool((priority == priority[0]).all())
            order = np.argsort(costs, kind="stable") if one_priority else np.lexsort((costs, priority))
            late = late_positions(start_s, seconds[rest].tolist(), dues[rest].tolist(), order.tolist())
            on_time[rest[late]] = False
        return np.flatnonzero(on_time).tolist(), np.flatnonzero(~on_time).tolist()

    def by_wait(self, late: Sequence[int], now: float) -> Iterable[QueuedRequest]:
        index = self._index[np.array(late)]
        priority = np.array([request.priority for request in self._requests])[index]
        weight = np.array([request.weight for request in self._requests])[index]
        arrival = np.array([request.arrival_s for request in self._requests])[index]
        order = np.lexsort(((arrival - now) * weight, -priority))
        return (self._requests[place] for place in index[order].tolist())


def few_candidates(
    queue: Sequence[QueuedRequest],
    engines: Mapping[str, EngineCapacity],
    now: float,
    bounds: Bounds,
    shut: Collection[str] = (),
) -> Candidates:
    """Those of a short queue whose engines can take a request, and whose deadline has not passed. Engines
    that are `shut` take only those beyond their bound."""
    rows: list[tuple[float, float, str, float, QueuedRequest]] = []
    overaged: list[tuple[float, str, QueuedRequest]] = []
    patience, unpromised = bounds.patience, bounds.unpromised_slo_s
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
        if now - arrival >= patience * (slo if slo < inf else unpromised):
            overaged.append((arrival, request.rid, request))
        elif request.model not in shut:
            seconds = engine.prefill_fixed_s + request.prompt_tokens / engine.prefill_tokens_per_s
            rows.append((arrival + slo, arrival, request.rid, seconds, request))
    rows.sort()
    overaged.sort()
    return Candidates(
        [row[4] for row in rows],
        [row[3] for row in rows],
        [row[0] for row in rows],
        [row[2] for row in overaged],
    )


def many_candidates(
    queue: Sequence[QueuedRequest],
    engines: Mapping[str, EngineCapacity],
    now: float,
    bounds: Bounds,
    shut: Collection[str] = (),
) -> Candidates:
    """The same of a long queue."""
    numbers: dict[str, int] = {}
    rates: list[float] = []
    fixed: list[float] = []
    for model, engine in engines.items():
        if engine.accepting and engine.running < engine.max_running:
            numbers[model] = len(rates)
            rates.append(engine.prefill_tokens_per_s)
            fixed.append(engine.prefill_fixed_s)
    number = np.array([numbers.get(request.model, -1) for request in queue])
    arrival = np.array([request.arrival_s for request in queue])
    slo = np.array([request.ttft_slo_s for request in queue])
    deadline = np.array([request.deadline_s for request in queue])
    able = (number >= 0) & (deadline > now)
    old = now - arrival >= bounds.patience * np.where(slo < inf, slo, bounds.unpromised_slo_s)
    oldest_first = _sorted(queue, np.flatnonzero(old & able), arrival, arrival)
    overaged = [queue[place] for place in oldest_first.tolist()]
    due = arrival + slo
    if shut:
        able &= ~np.isin(number, [numbers[model] for model in shut if model in numbers])
    index = _sorted(queue, np.flatnonzero(able & ~old), due, arrival)
    if not len(index):
        return Candidates([], [], [], overaged)
    tokens = np.array([request.prompt_tokens for request in queue])[index]
    number = number[index]
    seconds = np.array(fixed)[number] + tokens / np.array(rates)[number]
    return _ManyCandidates(queue, index, seconds, due[index], overaged)


def _sorted(queue: Sequence[QueuedRequest], index: Integers, times: Floats, arrivals: Floats) -> Integers:
    """Places in the queue by time, then arrival, then rid."""
    index = index[np.argsort(times[index])]
    ordered = times[index]
    if not (ordered[1:] == ordered[:-1]).any():
        return index
    names = np.array([queue[place].rid for place in index.tolist()])
    return index[np.lexsort((names, arrivals[index], ordered))]
