"""Earliest deadline first: one queue for all models of a GPU, by due time, whether it can be on time or not.

The textbook baseline: optimal while everybody can be on time, and the worst there is beyond that.
"""

from collections.abc import Mapping, Sequence

from prism.scheduling.admission.policy import Admission, EngineCapacity, GpuWork, QueuedRequest
from prism.scheduling.admission.release import STOPPED, PrefillBudget, Release


class EdfAdmission:
    """Released by due time within the same bounds as everywhere (see `release`). Nothing bounds a wait."""

    def __init__(self, budget: PrefillBudget | None = None) -> None:
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
        release = Release(engines, gpu, now, self._budget)
        ordered = [
            (request.arrival_s + request.ttft_slo_s, request.arrival_s, request.rid, request)
            for request in queue
            if request.deadline_s > now
        ]
        ordered.sort()
        for _, _, _, request in ordered:
            if release.offer(request) in STOPPED:
                break
        return release.admission()
