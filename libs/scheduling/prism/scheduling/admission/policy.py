"""What an admission policy sees and answers."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec


class QueuedRequest(msgspec.Struct, frozen=True):
    """A request that waits on a worker.

    `arrival_s` and `deadline_s` (the end of its whole time budget) are on the clock of `now`.
    `max_new_tokens` is what it may generate at most.
    """

    rid: str
    model: str
    arrival_s: float
    prompt_tokens: int
    max_new_tokens: int
    deadline_s: float
    priority: int = 0
    tenant: str = "default"

    @property
    def tokens(self) -> int:
        """KV tokens that it takes at most."""
        return self.prompt_tokens + self.max_new_tokens


class EngineCapacity(msgspec.Struct, frozen=True):
    """What one model's engine can take now. `kv_free_tokens` is its quota less all that the requests it
    runs may still come to take; cached prefixes that can be evicted count as free."""

    running: int
    max_running: int
    kv_free_tokens: int
    accepting: bool = True


class AdmissionPolicy(Protocol):
    """Decides, without a clock or a memory of its own."""

    def select(
        self, queue: Sequence[QueuedRequest], engines: Mapping[str, EngineCapacity], now: float
    ) -> list[str]:
        """The rids of `queue` (in any order) to start now on `engines` (by model), in the order to start
        them. Requests that it leaves out stay queued."""
        ...
