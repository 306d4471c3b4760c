"""How much of what Prism does is at work: the prototype's three modes, each building on the one before.

| mode | homes | KV cache |
|---|---|---|
| `static` | each model keeps its own | each model keeps its own |
| `elastic` | each model keeps its own | moves between the models of a GPU |
| `full` | models sleep, wake and move | moves between the models of a GPU |
"""

from prism.common.errors import ErrorCode, PrismError

MODES = ("static", "elastic", "full")
DEFAULT_MODE = "full"


def keeps_homes(mode: str) -> bool:
    """Whether every model stays where it is, awake."""
    return mode != "full"


def keeps_kv_quotas(mode: str) -> bool:
    """Whether every model keeps the KV cache that it was activated with."""
    return mode == "static"


def policy_in(mode: str, chosen: str | None, default: str) -> str:
    """The placement policy that decides in `mode`. Raises PrismError where another was chosen."""
    if not keeps_homes(mode):
        return default if chosen is None else chosen
    if chosen not in (None, "static"):
        raise PrismError(
            ErrorCode.INVALID_REQUEST,
            f"--policy {chosen} decides nothing in --mode {mode}, where models stay at home; "
            "leave one of the two out (they may come from PRISM_PLACEMENT_POLICY and PRISM_MODE)",
        )
    return "static"
