"""Which model is where: the interface, the cluster's snapshot, and the policies by name."""

from collections.abc import Callable
from dataclasses import fields

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


def policy_named(name: str, **settings: float) -> PlacementPolicy:
    """The policy, with those of the `settings` that it has; KeyError for a name that is not there."""
    defaults = policies[name]()
    known = {field.name for field in fields(defaults)}  # type: ignore[arg-type]
    return policies[name](**{key: value for key, value in settings.items() if key in known})


__all__ = [
    "DEFAULT_POLICY",
    "BalancedPlacement",
    "KvprPlacement",
    "LruPlacement",
    "MemoryPerRequestPlacement",
    "PlacementPolicy",
    "StaticPlacement",
    "policies",
    "policy_named",
]
