"""A request's own objectives, from its headers."""

import math

from starlette.datastructures import Headers

from prism.gateway.request_fields import invalid

TTFT_HEADER = "X-SLO-TTFT-Ms"
TPOT_HEADER = "X-SLO-TPOT-Ms"


def read_objective(headers: Headers, name: str) -> float | None:
    """Milliseconds in header `name`, None without it. Raises PrismError(invalid_request)."""
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise invalid(name, f"header {name} must be a number of milliseconds above 0; got {text!r}")
    return value
