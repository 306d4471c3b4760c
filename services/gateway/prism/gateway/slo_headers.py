"""A request's own objectives, from its headers."""

import math

from starlette.datastructures import Headers

from prism.gateway.request_fields import invalid

TTFT_HEADER = "X-SLO-TTFT-Ms"
TPOT_HEADER = "X-SLO-TPOT-Ms"
LEAST_MS, MOST_MS = 1, 86_400_000
"""The shortest and the longest objective that a request may state: a millisecond and a day."""


def read_objective(headers: Headers, name: str) -> float | None:
    """Milliseconds in header `name`, None without it. Raises PrismError(invalid_request)."""
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST_MS <= value <= MOST_MS:
        raise invalid(name, f"header {name} must be from {LEAST_MS} to {MOST_MS} milliseconds; got {text!r}")
    return value
