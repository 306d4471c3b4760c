"""Which model is where: the interface, the cluster's snapshot, and the policies by name."""

from collections.abc import Callable

from prism.scheduling.placement.balanced import BalancedPlacement
from prism.scheduling.placement.kvpr import KvprPlacement
from prism.scheduling.placement.lru import LruPlacement
from prism.scheduling.placement.memory_per_request import MemoryPerRequestPlacement
from prism.scheduling.placement.policy import PlacementPolicy
from prism.scheduling.placement.static import StaticPlacement

DEFAULT_POLICY = "balanced"

policies: dict[str, Callable[..., PlacementPolicy]] = {
    "balanced": BalancedPlacement,
    "kvpr": KvprPlacement,
    "lru": LruPlacement,
    "memory_per_request": MemoryPerRequestPlacement,
    "static": StaticPlacement,
}

__all__ = [
    "DEFAULT_POLICY",
    "BalancedPlacement",
    "KvprPlacement",
    "LruPlacement",
    "MemoryPerRequestPlacement",
    "PlacementPolicy",
    "StaticPlacement",
    "policies",
]
