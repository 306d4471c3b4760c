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

from collections.abc import Mapping, Sequence

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
    ONCE_OVERAGED,
    STARTED,
    STOPPED,
    TWICE_OVERAGED,
    PrefillBudget,
    Release,
)

VECTORISED_FROM = 64
"""From so many requests on, arrays are faster than loops."""


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
        if (nothing := self._budget.nothing_yet(queue, gpu, now)) is not None:
            return nothing
        room = DecodeRoom(engines, gpu)
        release = Release(engines, gpu, now, self._budget, room)
        if len(queue) == 1 and release.offer_alive(queue[0]) is STARTED:
            return release.admission()
        shut = [
            model for model, engine in engines.items() if not engine.running and not room.has_room(engine)
        ]
        gather = few_candidates if len(queue) < VECTORISED_FROM else many_candidates
        candidates = gather(queue, engines, now, self._bounds, shut)
        self._release_all(candidates, release, gpu, now)
        return release.admission()

    def _release_all(self, candidates: Candidates, release: Release, gpu: GpuWork, now: float) -> None:
        overaged = candidates.overaged
        if overaged:
            release.engines_kept_free = 1
            if not self._release_overaged(overaged, release, gpu, now):
                return
        kept, late = candidates.split(release.until_s)
        if not self._release_on_time(candidates, kept, release, now):
            return
        for request in overaged:
            if release.offer(request) in STOPPED:
                return
        if late:
            for request in candidates.by_wait(late, now):
                if release.offer(request) in STOPPED:
                    return

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
            twice = self._bounds.exceeded(request, now, times=2.0)
            overage = TWICE_OVERAGED if twice else ONCE_OVERAGED
            if release.offer(request, urgent=True, overaged=overage) is FULL:
                return False
            all_s += release.until_s - before
            theirs_s += release.until_s - before
            offered += 1
        del overaged[:offered]
        return True

    def _release_on_time(
        self, candidates: Candidates, kept: Sequence[int], release: Release, now: float
    ) -> bool:
        """Offer those that can be on time. False when nothing more can start."""
        urgent = False
        for offered, position in enumerate(kept):
            request = candidates.request(position)
            outcome = release.offer(request, urgent=urgent)
            if outcome is HELD:
                slack_s = candidates.slack(kept[offered:], release.until_s) - self._budget.lookahead_s
                if slack_s > 0:
                    release.look_again(now + slack_s)
                    return False
                urgent = True
                outcome = release.offer(request, urgent=True)
            if outcome is FULL:
                return False
        return True
