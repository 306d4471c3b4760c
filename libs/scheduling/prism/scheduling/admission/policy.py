"""What an admission policy sees and answers."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Protocol

import msgspec

from prism.scheduling.admission.prefill_cost import UNBOUNDED_PASS, PrefillCost

PREFILL_WINDOW_S = 1.0
"""Over how long the shares of prefill and decode in a GPU's time are looked at, in seconds."""


class QueuedRequest(msgspec.Struct, frozen=True):
    """A request that waits on a worker.

    `arrival_s` and `deadline_s` (the end of its whole time budget) are on the clock of `now`.
    `max_new_tokens` is what it may generate at most, `expected_new_tokens` what it probably will (None: not
    known). `ttft_slo_s` is the time from arrival within which its first token is promised; infinite without a
    promise. `weight` is its share relative to others', above 0.
    """

    rid: str
    model: str
    arrival_s: float
    prompt_tokens: int
    max_new_tokens: int
    deadline_s: float
    priority: int = 0
    ttft_slo_s: float = inf
    expected_new_tokens: int | None = None
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """KV tokens that it takes, as far as is known: at most, or probably."""
        if self.expected_new_tokens is None:
            return self.prompt_tokens + self.max_new_tokens
        return self.prompt_tokens + min(self.max_new_tokens, self.expected_new_tokens)

    @property
    def first_token_due_s(self) -> float:
        """When its first token is due, on the clock of `now`."""
        return self.arrival_s + self.ttft_slo_s


class EngineCapacity(msgspec.Struct, frozen=True):
    """What one model's engine can take now, and how fast it is. `kv_free_tokens` is its quota less all that
    the requests it runs may still come to take; cached prefixes that can be evicted count as free.

    A pass of prefill over n tokens, `pass_tokens` at most, takes `prefill_fixed_s` + n /
    `prefill_tokens_per_s` seconds while nobody else uses the GPU; an engine that has not been measured has an
    infinite rate. It was given `open_tokens` of prompts that it has not begun with: a prompt that is released
    now joins their pass. The first of them that can be on time is due at `open_due_s`.

    `decoding` requests of it are past their prefill; one decode step of them takes `decode_step_s`, and
    `tpot_slo_s` is what each token is promised in (infinite: no promise). `decode_alone_s` is what a step
    takes, or took lately, while no other engine computes; 0 when that is not known. It has run something
    without a break since `busy_since_s`, on the clock of `now`.
    """

    running: int
    max_running: int
    kv_free_tokens: int
    accepting: bool = True
    prefill_tokens_per_s: float = inf
    prefill_fixed_s: float = 0.0
    decoding: int = 0
    decode_step_s: float = 0.0
    tpot_slo_s: float = inf
    decode_alone_s: float = 0.0
    pass_tokens: int = UNBOUNDED_PASS
    open_tokens: int = 0
    open_due_s: float = inf
    busy_since_s: float = 0.0

    @property
    def prefill_cost(self) -> PrefillCost:
        """What its prompts cost."""
        return PrefillCost(self.prefill_fixed_s, 1.0 / self.prefill_tokens_per_s, self.pass_tokens)


class GpuWork(msgspec.Struct, frozen=True):
    """What the GPU that all engines share has been given already.

    `prefill_until_s` is when the prefill of the requests released so far will probably be done, on the clock
    of `now`; in the past when there is none. `recent_prefill_s` is how many seconds of prefill were released
    within the last PREFILL_WINDOW_S, and `recent_overaged_s` the part of it that went to requests which had
    waited beyond their bound. `PrefillBacklog` keeps count of all three.
    """

    prefill_until_s: float = 0.0
    recent_prefill_s: float = 0.0
    recent_overaged_s: float = 0.0


class Admission(msgspec.Struct, frozen=True):
    """The `rids` to start now, in this order, and when to look again even if nothing happens until then."""

    rids: list[str]
    again_at_s: float | None = None


class AdmissionPolicy(Protocol):
    """Decides, without a clock or a memory of its own."""

    def select(
        self,
        queue: Sequence[QueuedRequest],
        engines: Mapping[str, EngineCapacity],
        gpu: GpuWork,
        now: float,
    ) -> Admission:
        """Which of `queue` (in any order) to start now on `engines` (by model). Requests that it leaves out
        stay queued."""
        ...
