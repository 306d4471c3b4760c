"""The requests that an admission decision is about, in the order of their due times.

Two forms of the same: loops for few requests, arrays for many. Ties are broken by arrival, then by rid, so
that the order of the queue makes no difference.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from prism.scheduling.admission.on_time import late_positions
from prism.scheduling.admission.policy import EngineCapacity, QueuedRequest
from prism.scheduling.admission.release import PrefillBudget

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


LEAST_SLO_S = 0.05
"""Shorter objectives count as this where waits are bounded: whoever asks for the impossible does not go ahead
of everybody else."""


class Bounds(msgspec.Struct, frozen=True):
    """How long a request may wait: `patience` times its objective, which is taken as `unpromised_slo_s`
    seconds where it has none, and as no shorter than its own prefill and LEAST_SLO_S. `overaged_share` is the
    share of prefill time for those who have waited longer; 1 puts them before everybody else whatever that
    costs."""

    patience: float = 12.0
    unpromised_slo_s: float = 10.0
    overaged_share: float = 0.5

    def of(self, slo_s: float, prefill_s: float) -> float:
        """How many seconds a request with this objective and so much prefill of its own may wait."""
        objective_s = slo_s if slo_s < inf else self.unpromised_slo_s
        return self.patience * max(objective_s, prefill_s, LEAST_SLO_S)

    def waited(self, request: QueuedRequest, engine: EngineCapacity, now: float) -> int:
        """How many times its bound it has waited, 0 as long as it is not beyond it."""
        prefill_s = request.prompt_tokens * (1.0 / engine.prefill_tokens_per_s)
        return int((now - request.arrival_s) / self.of(request.ttft_slo_s, prefill_s))


class Family:
    """What the prompts of one model cost when they are prefilled together: they are a family with a setup.

    `setup_s` is the fixed part of a pass, 0 when one is open. A pass holds `filled_tokens`; of those beyond
    the first pass each carries its share of another fixed part, a whole one at most. First tokens come at the
    end of a pass, so each may have to wait for up to `margin_s` of those that are due after it.
    """

    __slots__ = ("filled_tokens", "fixed_s", "margin_s", "number", "setup_s", "token_s")

    def __init__(self, number: int, engine: EngineCapacity, budget: PrefillBudget) -> None:
        self.number = number
        self.fixed_s = fixed_s = engine.prefill_fixed_s
        self.token_s = 1.0 / engine.prefill_tokens_per_s
        self.setup_s = 0.0 if engine.open_tokens else fixed_s
        self.filled_tokens = float(engine.pass_tokens)
        if self.token_s:
            fits = (budget.filled_s(fixed_s) - fixed_s) / self.token_s
            self.filled_tokens = max(1.0, min(self.filled_tokens, fits))
        self.margin_s = min((budget.fixed_parts - 1.0) * fixed_s, engine.pass_tokens * self.token_s)


class Candidates:
    """Requests that may start, by due time, with the seconds of prefill of each and its model's place in
    `setups`; those beyond their bound are `overaged`, oldest first, and not among them."""

    __slots__ = ("_requests", "count", "dues", "families", "overaged", "seconds", "setups")

    def __init__(
        self,
        requests: Sequence[QueuedRequest],
        seconds: Sequence[float],
        dues: Sequence[float],
        families: Sequence[int],
        setups: Sequence[float],
        overaged: list[QueuedRequest],
    ) -> None:
        self._requests = requests
        self.seconds = seconds
        self.dues = dues
        self.families = families
        self.setups = setups
        self.count = len(dues)
        self.overaged = overaged

    def request(self, position: int) -> QueuedRequest:
        """The one at this position."""
        return self._requests[position]

    def split(self, start_s: float) -> tuple[Sequence[int], Sequence[int]]:
        """Positions of those that can all be on time when prefill begins at `start_s`, and of those that are
        given up for them."""
        if self.slack(range(self.count), start_s) >= 0:
            return range(self.count), ()
        keyed = [
            (request.priority, -job_s / request.weight, position)
            for position, request, job_s in zip(range(self.count), self._requests, self.seconds, strict=True)
        ]
        keyed.sort()
        order = [row[2] for row in keyed]
        late = late_positions(start_s, self.seconds, self.dues, order, self.families, self.setups)
        late.sort()
        return [position for position in range(self.count) if position not in late], late

    def slack(self, positions: Iterable[int], start_s: float) -> float:
        """By how many seconds prefill can begin later than `start_s` with all of these on time; below 0 when
        it can't."""
        least, at = inf, start_s
        setups = list(self.setups)
        for position in positions:
            family = self.families[position]
            at += self.seconds[position] + setups[family]
            setups[family] = 0.0
            least = min(least, self.dues[position] - at)
        return least

    def by_wait(self, late: Sequence[int], now: float) -> Sequence[QueuedRequest]:
        """The late ones: higher priorities first, then the longest wait times weight."""
        keyed = []
        for position in late:
            request = self._requests[position]
            keyed.append((-request.priority, (request.arrival_s - now) * request.weight, position))
        keyed.sort()
        return [self._requests[row[2]] for row in keyed]


class _ManyCandidates(Candidates):
    """The same in arrays; requests are looked up in the queue when they are asked for."""

    __slots__ = ("_due_array", "_family_array", "_index", "_second_array")

    def __init__(
        self,
        queue: Sequence[QueuedRequest],
        index: Integers,
        seconds: Floats,
        dues: Floats,
        families: Integers,
        setups: Sequence[float],
        overaged: list[QueuedRequest],
    ) -> None:
        super().__init__(queue, seconds.tolist(), dues.tolist(), families.tolist(), setups, overaged)
        self._index = index
        self._second_array = seconds
        self._due_array = dues
        self._family_array = families

    def request(self, position: int) -> QueuedRequest:
        return self._requests[int(self._index[position])]

    def split(self, start_s: float) -> tuple[Sequence[int], Sequence[int]]:
        seconds, dues, families = self._second_array, self._due_array, self._family_array
        present, firsts = np.unique(families, return_index=True)
        setups = np.array(self.setups)
        paid = np.zeros(len(seconds))
        paid[firsts] = setups[present]
        if not (start_s + np.cumsum(seconds + paid) > dues).any():
            return range(self.count), ()
        on_time = start_s + setups[families] + seconds <= dues
        rest = np.flatnonzero(on_time)
        if len(rest):
            priority = _integers([request.priority for request in self._requests])[self._index[rest]]
            weight = _floats([request.weight for request in self._requests])[self._index[rest]]
            costs = -seconds[rest] / weight
            one_priority = bool((priority == priority[0]).all())
            order = np.argsort(costs, kind="stable") if one_priority else np.lexsort((costs, priority))
            everyone = len(rest) == self.count
            late = late_positions(
                start_s,
                self.seconds if everyone else seconds[rest].tolist(),
                self.dues if everyone else dues[rest].tolist(),
                order.tolist(),
                () if not setups.any() else self.families if everyone else families[rest].tolist(),
                self.setups if setups.any() else (),
            )
            on_time[rest[late]] = False
        return np.flatnonzero(on_time).tolist(), np.flatnonzero(~on_time).tolist()

    def by_wait(self, late: Sequence[int], now: float) -> Sequence[QueuedRequest]:
        index = self._index[np.array(late)]
        priority = _integers([request.priority for request in self._requests])[index]
        weight = _floats([request.weight for request in self._requests])[index]
        arrival = _floats([request.arrival_s for request in self._requests])[index]
        order = np.lexsort(((arrival - now) * weight, -priority))
        return _Chosen(self._requests, index[order])


class _Chosen(Sequence[QueuedRequest]):
    """Places of a queue, in an order."""

    def __init__(self, queue: Sequence[QueuedRequest], index: Integers) -> None:
        self._queue = queue
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return _Chosen(self._queue, self._index[place])
        return self._queue[int(self._index[place])]


_Row = tuple[float, float, str, float, int, QueuedRequest]


def few_candidates(
    queue: Sequence[QueuedRequest],
    engines: Mapping[str, EngineCapacity],
    start_s: float,
    now: float,
    bounds: Bounds,
    budget: PrefillBudget,
    shut: Collection[str] = (),
) -> Candidates:
    """Those of a short queue whose engines can take a request, and whose deadline has not passed; prefill
    begins at `start_s`. Engines that are `shut` take only those beyond their bound."""
    rows: list[_Row] = []
    overaged: list[tuple[float, str, QueuedRequest]] = []
    found: dict[str, Family] = {}
    for request in queue:
        engine = engines.get(request.model)
        if (
            engine is None
            or not engine.accepting
            or engine.running >= engine.max_running
            or request.deadline_s <= now
        ):
            continue
        family = found.get(request.model)
        if family is None:
            family = found[request.model] = Family(len(found), engine, budget)
        arrival = request.arrival_s
        slo = request.ttft_slo_s
        work_s = request.prompt_tokens * family.token_s
        if now - arrival >= bounds.of(slo, work_s):
            overaged.append((arrival, request.rid, request))
        elif request.model not in shut:
            rows.append((arrival + slo, arrival, request.rid, work_s, family.number, request))
    families = list(found.values())
    rows.sort()
    if len(rows) > 1 and any(family.fixed_s for family in families):
        rows = _few_together(rows, families, start_s)
        rows.sort()
    overaged.sort()
    return Candidates(
        [row[5] for row in rows],
        [row[3] for row in rows],
        [row[0] for row in rows],
        [row[4] for row in rows],
        [family.setup_s for family in families],
        [row[2] for row in overaged],
    )


def _few_together(rows: Sequence[_Row], families: Sequence[Family], start_s: float) -> list[_Row]:
    """By due time with the tokens' seconds, to by what `Family` says of both."""
    left_s = [0.0] * len(families)
    before = [0.0] * len(families)
    for _, _, _, work_s, number, _ in rows:
        left_s[number] += work_s
    changed = []
    for due, arrival, rid, work_s, number, request in rows:
        family = families[number]
        left_s[number] -= work_s
        # Who has less time than a whole pass can still go in a smaller one.
        spare_s = due - start_s - family.setup_s - work_s
        margin_s = max(0.0, min(family.margin_s, left_s[number], spare_s / 2))
        tokens = request.prompt_tokens
        share_s = family.fixed_s * min(1.0, tokens / family.filled_tokens)
        seconds = work_s + (share_s if before[number] >= family.filled_tokens else 0.0)
        before[number] += tokens
        changed.append((due - margin_s, arrival, rid, seconds, number, request))
    return changed


def many_candidates(
    queue: Sequence[QueuedRequest],
    engines: Mapping[str, EngineCapacity],
    start_s: float,
    now: float,
    bounds: Bounds,
    budget: PrefillBudget,
    shut: Collection[str] = (),
) -> Candidates:
    """The same of a long queue."""
    every: list[Family] = []
    numbers: dict[str, int] = {}
    for model, engine in engines.items():
        if engine.accepting and engine.running < engine.max_running:
            numbers[model] = len(every)
            every.append(Family(len(every), engine, budget))
    number = _integers([numbers.get(request.model, -1) for request in queue])
    arrival = _floats([request.arrival_s for request in queue])
    slo = _floats([request.ttft_slo_s for request in queue])
    deadline = _floats([request.deadline_s for request in queue])
    able = (number >= 0) & (deadline > now)
    tokens = _integers([request.prompt_tokens for request in queue])
    # The last one is for requests of models that have no engine.
    token_s = np.array([*(family.token_s for family in every), 0.0])
    seconds = tokens * token_s[number]
    objective = np.where(slo < inf, slo, bounds.unpromised_slo_s)
    old = now - arrival >= bounds.patience * np.maximum(np.maximum(objective, seconds), LEAST_SLO_S)
    oldest_first = _sorted(queue, np.flatnonzero(old & able), arrival, arrival)
    overaged = [queue[place] for place in oldest_first.tolist()]
    due = arrival + slo
    if shut:
        able &= ~np.isin(number, [numbers[model] for model in shut if model in numbers])
    index = _sorted(queue, np.flatnonzero(able & ~old), due, arrival)
    if not len(index):
        return Candidates([], [], [], [], [], overaged)
    if any(family.fixed_s for family in every):
        margin, share = _many_together(
            tokens[index], seconds[index], due[index], number[index], every, start_s
        )
        seconds[index] += share
        due[index] -= margin
        index = _sorted(queue, index, due, arrival, "stable")
    setups = [family.setup_s for family in every]
    return _ManyCandidates(queue, index, seconds[index], due[index], number[index], setups, overaged)


def _many_together(
    tokens: Integers,
    work_s: Floats,
    due: Floats,
    number: Integers,
    families: Sequence[Family],
    start_s: float,
) -> tuple[Floats, Floats]:
    """By how much earlier each must be thought to be due, and its share of fixed parts (see `Family`)."""
    by_family = np.argsort(number, kind="stable")
    members = number[by_family]
    sizes = np.bincount(number, minlength=len(families))
    ends = np.cumsum(sizes)
    first, last = (ends - sizes)[members], (ends - 1)[members]
    done_s, done = np.cumsum(work_s[by_family]), np.cumsum(tokens[by_family])
    left_s, before = np.empty_like(work_s), np.empty_like(work_s)
    left_s[by_family] = done_s[last] - done_s
    before[by_family] = done - tokens[by_family] - (done - tokens[by_family])[first]
    setup_s = np.array([family.setup_s for family in families])[number]
    most_s = np.array([family.margin_s for family in families])[number]
    filled = np.array([family.filled_tokens for family in families])[number]
    fixed_s = np.array([family.fixed_s for family in families])[number]
    spare_s = due - start_s - setup_s - work_s
    margin = np.maximum(0.0, np.minimum(np.minimum(most_s, left_s), spare_s / 2))
    return margin, np.where(before >= filled, fixed_s * np.minimum(1.0, tokens / filled), 0.0)


def _sorted(
    queue: Sequence[QueuedRequest],
    index: Integers,
    times: Floats,
    arrivals: Floats,
    kind: Literal["quicksort", "stable"] = "quicksort",
) -> Integers:
    """Places in the queue by time, then arrival, then rid. "stable" is faster when they are nearly so now."""
    index = index[np.argsort(times[index], kind=kind)]
    ordered = times[index]
    if not (ordered[1:] == ordered[:-1]).any():
        return index
    names = np.array([queue[place].rid for place in index.tolist()])
    return index[np.lexsort((names, arrivals[index], ordered))]


def _floats(values: list[float]) -> Floats:
    """An array, faster than by asking for the type of each value."""
    return np.fromiter(values, np.float64, len(values))


def _integers(values: list[int]) -> Integers:
    """An array, faster than by asking for the type of each value."""
    return np.fromiter(values, np.int64, len(values))
