"""What models will have to generate, where what they have generated says too little.

Tokens are counted when they are generated. So a model whose requests still wait, or that was asked for a
moment ago, seems to ask for nearly nothing; and that is when it is decided where it goes, and who sleeps for
it.
"""

from collections import defaultdict
from collections.abc import Mapping

import msgspec

from prism.scheduling.placement.snapshot import ClusterSnapshot, ModelView
from prism.scheduling.placement.wants import NO_DEMAND

UNKNOWN_TOKENS = 200.0
"""What a request generates where no model has generated anything yet."""

PRIOR_REQUESTS = 2.0
"""For so many requests the mean of all models stands, beside those that a model has ended."""


def with_expected_load(snapshot: ClusterSnapshot) -> ClusterSnapshot:
    """The snapshot with each model's `output_tokens_per_s` as it will be: its requests a second times what a
    request generates, which is learned from those that are neither parked, queued nor running. Requests that
    are parked are among those that it is asked for, even where nobody has counted them yet."""
    under_way: dict[str, int] = defaultdict(int)
    for name, demand in snapshot.demand.items():
        under_way[name] += demand.parked
    for worker in snapshot.workers:
        for name, resident in worker.models.items():
            if resident.busy:
                under_way[name] += resident.queued + resident.running
    ended, tokens = 0.0, 0.0
    for name, view in snapshot.models.items():
        if view.traffic.arrivals_per_s > 0:
            ended += _ended(view, under_way.get(name, 0))
            tokens += view.traffic.output_tokens_per_s * view.traffic.window_s
    typical = tokens / ended if ended >= 1.0 else UNKNOWN_TOKENS
    changed: dict[str, ModelView] = {}
    for name, count in under_way.items():
        known = snapshot.models.get(name)
        if count and known is not None:
            traffic = known.traffic
            demand = snapshot.demand.get(name, NO_DEMAND)
            arrivals = max(traffic.arrivals_per_s, demand.parked / traffic.window_s)
            had = traffic.output_tokens_per_s * traffic.window_s + typical * PRIOR_REQUESTS
            each = had / (_ended(known, count) + PRIOR_REQUESTS)
            expected = max(traffic.output_tokens_per_s, arrivals * each)
            traffic = msgspec.structs.replace(traffic, arrivals_per_s=arrivals, output_tokens_per_s=expected)
            changed[name] = msgspec.structs.replace(known, traffic=traffic)
    if not changed:
        return snapshot
    models: Mapping[str, ModelView] = {**snapshot.models, **changed}
    return msgspec.structs.replace(snapshot, models=models)


def _ended(view: ModelView, under_way: int) -> float:
    return max(0.0, view.traffic.arrivals_per_s * view.traffic.window_s - under_way)
