"""Which models no request would wake as things are: the policy, asked as if one waited for each.

A plan alone does not say: most policies look at a model only once requests wait for it.
"""

from collections.abc import Callable
from time import monotonic

import msgspec

from prism.common.garbage import garbage_collected_later
from prism.common.messages.explain import ExplainedNote
from prism.common.messages.placement import CommandKind
from prism.scheduling.placement import PlacementPolicy
from prism.scheduling.placement.actions import Activate
from prism.scheduling.placement.snapshot import ClusterSnapshot, Demand
from prism.scheduling.placement.wants import AT_WORK

LEAST_S = 0.5
LARGEST_SHARE = 0.05
MOST_TOLD = 1000
ONE_WAITS = Demand(1)


def obstacles(policy: PlacementPolicy, snapshot: ClusterSnapshot, now: float) -> list[ExplainedNote]:
    """What stands in the way of models that serve nowhere and are not on their way up, unless it passes by
    itself. What a store says of a folder is not told again."""
    demand = dict(snapshot.demand)
    for name in snapshot.models:
        if name not in demand or not demand[name].parked:
            demand[name] = ONE_WAITS
    plan = policy.plan(msgspec.structs.replace(snapshot, demand=demand, balance=False), now)
    rising = {action.model for action in plan.actions if isinstance(action, Activate)}
    rising |= {one.model for one in snapshot.in_flight if one.kind is CommandKind.ACTIVATE}
    serving = {
        name
        for worker in snapshot.workers
        if not worker.draining
        for name, model in worker.models.items()
        if model.state in AT_WORK
    }
    readable = {
        name for name, view in snapshot.models.items() if view.facts is not None and view.facts.error is None
    }
    out_of_reach = readable - serving - rising
    return [
        ExplainedNote(note.model, note.text)
        for note in plan.notes
        if not note.passing and note.model in out_of_reach
    ]


class Outlook:
    """The obstacles, looked for as seldom as LEAST_S and LARGEST_SHARE of the time that it takes allow,
    however often somebody asks."""

    def __init__(self, policy: PlacementPolicy, clock: Callable[[], float] = monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._found: list[ExplainedNote] = []
        self._due = 0.0

    def look(self, snapshot: Callable[[], ClusterSnapshot]) -> list[ExplainedNote]:
        """Those found last, MOST_TOLD of them at most."""
        began = self._clock()
        if began >= self._due:
            with garbage_collected_later():
                self._found = obstacles(self._policy, snapshot(), began)[:MOST_TOLD]
            took = self._clock() - began
            self._due = began + max(LEAST_S, took / LARGEST_SHARE)
        return self._found
