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

Prompts of one model that are prefilled together share the fixed part of a pass (see `prefill_cost`). Models
are families with a setup for Moore-Hodgson, and whoever opens a pass is followed by those of its model that
come later in the same class, as long as whoever they overtake can be on time still.

Priorities and weights have no say in 1, so they move nobody beyond the bound. Requests of engines that can't
take any now don't compete. See `release` for what bounds a release.

Source of the idea: Prism (arXiv 2505.04021), algorithm 2, which leaves open what happens to late requests.
"""

from collections.abc import Mapping, Sequence
from math import inf

from prism.scheduling.admission.candidates import (
    Bounds,
    Candidates,
    few_candidates,
    many_candidates,
)
from prism.scheduling.admission.decode_room import DecodeRoom
from prism.scheduling.admission.policy import Admission, EngineCapacity, GpuWork, QueuedRequest
from prism.scheduling.admission.release import (
    FULL,
    HELD,
    LOOK_FOR_ROOM_S,
    PRESSING,
    STARTED,
    STOPPED,
    PrefillBudget,
    Release,
)

VECTORISED_FROM = 64
"""From so many requests on, arrays are faster than loops."""
FILL_FROM = 256
"""So many of the next in order are looked at for a pass: more than fit in most, and a bound on the time."""


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
        if (nothing := self._budget.nothing_yet(queue, engines, gpu, now)) is not None:
            return nothing
        room = DecodeRoom(engines, gpu)
        release = Release(engines, gpu, now, self._budget, room)
        if len(queue) == 1 and release.offer_alive(queue[0]) is STARTED:
            return release.admission()
        shut = [
            model for model, engine in engines.items() if not engine.running and not room.has_room(engine)
        ]
        gather = few_candidates if len(queue) < VECTORISED_FROM else many_candidates
        candidates = gather(queue, engines, release.until_s, now, self._bounds, self._budget, shut)
        if shut and room.too_many:
            for request in candidates.overaged:
                if request.model not in shut:
                    continue
                if self._bounds.waited(request, engines[request.model], now) >= PRESSING:
                    release.make_way(request, room.too_many)
                    break
        self._release_all(candidates, release, gpu, now)
        if shut:
            release.look_again(now + LOOK_FOR_ROOM_S)
        return release.admission()

    def _release_all(self, candidates: Candidates, release: Release, gpu: GpuWork, now: float) -> None:
        overaged, full = candidates.overaged, False
        if overaged:
            release.engines_kept_free = 1
            full = not self._release_overaged(overaged, release, gpu, now)
            if full and not release.open_models:
                return
        kept, late = candidates.split(release.until_s)
        if not self._release_on_time(candidates, kept, release, now, full=full):
            return
        for request in overaged:
            if release.offer(request) in STOPPED:
                return
        if late:
            self._release_late(candidates.by_wait(late, now), release)

    def _release_overaged(
        self, overaged: list[QueuedRequest], release: Release, gpu: GpuWork, now: float
    ) -> bool:
        """Offer those that go first now, and drop them from the list. False when nothing more can start."""
        share = self._bounds.overaged_share
        all_s, theirs_s = gpu.recent_prefill_s, gpu.recent_overaged_s
        offered = 0
        for request in overaged:
            if theirs_s > share * all_s:
                break
            before = release.until_s
            waited = self._bounds.waited(request, release.engines[request.model], now)
            if release.offer(request, urgent=True, bounds_waited=waited) is FULL:
                return False
            all_s += release.until_s - before
            theirs_s += release.until_s - before
            offered += 1
        del overaged[:offered]
        return True

    def _release_on_time(
        self, candidates: Candidates, kept: Sequence[int], release: Release, now: float, *, full: bool
    ) -> bool:
        """Offer those that can be on time; when it is `full` already, only to passes that are open. False
        when nothing more can start."""
        started: set[int] = set()
        for model in release.open_models:
            self._fill(model, candidates, kept, 0, started, release)
        if full:
            return False
        urgent = False
        for place, position in enumerate(kept):
            if position in started:
                continue
            request = candidates.request(position)
            outcome = release.offer(request, urgent=urgent)
            if outcome is HELD:
                rest = [each for each in kept[place:] if each not in started]
                slack_s = candidates.slack(rest, release.until_s) - self._budget.lookahead_s
                if slack_s > 0:
                    release.look_again(now + slack_s)
                    return False
                urgent = True
                outcome = release.offer(request, urgent=True)
            if outcome is FULL:
                return False
            if outcome is STARTED:
                self._fill(request.model, candidates, kept, place + 1, started, release)
        return True

    def _fill(
        self,
        model: str,
        candidates: Candidates,
        kept: Sequence[int],
        first: int,
        started: set[int],
        release: Release,
    ) -> None:
        """Have those of `model` that come later join its open pass, as long as all whom they overtake can be
        on time still."""
        at, room_s = release.until_s, inf
        setups = list(candidates.setups)
        for position in kept[first : first + FILL_FROM]:
            if position in started:
                continue
            request = candidates.request(position)
            seconds = release.joining_s(request)
            if request.model != model or seconds > room_s:
                family = candidates.families[position]
                at += setups[family] + candidates.seconds[position]
                setups[family] = 0.0
                room_s = min(room_s, candidates.dues[position] - at)
                if room_s <= 0:
                    return
                continue
            if not release.joins(request) or release.offer(request) is not STARTED:
                return
            started.add(position)
            at += seconds
            room_s -= seconds

    def _release_late(self, late: Sequence[QueuedRequest], release: Release) -> None:
        """Nobody keeps a promise by going first here, so each pass that is opened is filled."""
        started: set[str] = set()
        for place, request in enumerate(late):
            if request.rid in started:
                continue
            outcome = release.offer(request)
            if outcome in STOPPED:
                return
            if outcome is STARTED:
                for other in late[place + 1 : place + 1 + FILL_FROM]:
                    if other.model != request.model or other.rid in started:
                        continue
                    if not release.joins(other) or release.offer(other) is not STARTED:
                        break
                    started.add(other.rid)
