"""The interface of placement policies."""

from typing import Protocol

from prism.scheduling.placement.actions import Plan
from prism.scheduling.placement.snapshot import ClusterSnapshot


class PlacementPolicy(Protocol):
    """Says what should change, from what is: without a clock, I/O or a memory of its own.

    Level-triggered: what a plan leaves undone, or what fails, a later plan of a later snapshot takes up.
    """

    def plan(self, snapshot: ClusterSnapshot, now: float) -> Plan:
        """Actions that can all be started now, together, in this order. Every activation fits into memory
        that is free now; none touches a model that has a command in flight on that worker."""
        ...
