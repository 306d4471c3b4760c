"""Taking up a failed model again: `prism.v1.scheduler.retry`, answered by the leading scheduler."""

import msgspec

from prism.common.errors import ErrorBody
from prism.common.messages.models import ModelFacts, ModelState


class RetryRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Look at `model` again and forget that it failed, within `deadline_s` seconds."""

    model: str
    deadline_s: float = 60.0


class RetryOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state that `model` is in now. `failed` comes with an `error` that says why it still is; any other
    state with the `facts` that a store found. `workers`: those that had it failed, and where it stands there.
    """

    model: str
    state: ModelState
    error: ErrorBody | None = None
    facts: ModelFacts | None = None
    workers: dict[str, ModelState] = {}
