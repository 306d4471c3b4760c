"""First come, first served, each model on its own."""

from collections.abc import Mapping, Sequence

from prism.scheduling.admission.policy import Admission, EngineCapacity, GpuWork, QueuedRequest


class FirstComeAdmission:
    """Oldest first within a model; a model that can't take its oldest request holds up no other model.

    A request starts when its engine has room for its prompt and all that it may generate. An engine that
    runs nothing takes its oldest request whatever the size: waiting would never make more room.
    O(n log n) in the length of the queue.
    """

    def select(
        self,
        queue: Sequence[QueuedRequest],
        engines: Mapping[str, EngineCapacity],
        gpu: GpuWork,
        now: float,
    ) -> Admission:
        """See AdmissionPolicy. Requests whose deadline has passed are never started."""
        left: dict[str, EngineCapacity] = dict(engines)
        closed: set[str] = {model for model, engine in left.items() if not engine.accepting}
        chosen: list[str] = []
        for request in sorted(queue, key=lambda queued: (queued.arrival_s, queued.rid)):
            engine = left.get(request.model)
            if engine is None or request.model in closed or request.deadline_s <= now:
                continue
            fits = request.tokens <= engine.kv_free_tokens or engine.running == 0
            if engine.running >= engine.max_running or not fits:
                closed.add(request.model)
                continue
            chosen.append(request.rid)
            left[request.model] = EngineCapacity(
                engine.running + 1, engine.max_running, engine.kv_free_tokens - request.tokens
            )
        return Admission(chosen)
