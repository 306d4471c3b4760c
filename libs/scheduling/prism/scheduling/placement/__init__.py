"""Which model is where: the interface, the cluster's snapshot, and the policies by name."""

from collections.abc import Callable

from prism.scheduling.placement.lru import LruPlacement
from prism.scheduling.placement.policy import PlacementPolicy

policies: dict[str, Callable[..., PlacementPolicy]] = {"lru": LruPlacement}

__all__ = ["LruPlacement", "PlacementPolicy", "policies"]
