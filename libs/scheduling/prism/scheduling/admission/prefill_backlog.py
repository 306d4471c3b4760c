"""How much prefill a GPU has been given: what is left of it, what it had lately, and which passes are
open."""

from collections import deque
from math import inf
from typing import NamedTuple

from prism.scheduling.admission.policy import PREFILL_WINDOW_S, GpuWork
from prism.scheduling.admission.prefill_cost import UNBOUNDED_PASS, PrefillCost


class _Released(NamedTuple):
    ends_s: float
    seconds: float
    overaged: bool


class _Pending(NamedTuple):
    model: str
    seconds: float


class _Waiting(NamedTuple):
    tokens: int
    due_s: float


class OpenPass(NamedTuple):
    """The prompts that an engine was given and has not begun with: how many tokens they have, and when the
    first of those that can be on time is due (infinite: none can, or none has to)."""

    tokens: int = 0
    due_s: float = inf


CLOSED = OpenPass()


class _Passes:
    """One engine's prompts: those of the pass it computes, and those that wait for the next ones.

    An engine without any begins at once, so only what is released at the same instant joins the first.
    """

    __slots__ = ("_began", "_began_s", "_computing", "_pass_tokens", "_waiting", "_waiting_tokens")

    def __init__(self) -> None:
        self._computing: set[str] = set()
        self._waiting: dict[str, _Waiting] = {}
        self._waiting_tokens = 0
        self._began = CLOSED
        self._began_s = -inf
        self._pass_tokens = UNBOUNDED_PASS

    def open(self, now: float) -> OpenPass:
        """What a prompt that is released now joins."""
        if self._waiting:
            return OpenPass(self._waiting_tokens, min(each.due_s for each in self._waiting.values()))
        return self._began if now <= self._began_s else CLOSED

    def open_tokens(self, now: float) -> int:
        """Its tokens."""
        if self._waiting:
            return self._waiting_tokens
        return self._began.tokens if now <= self._began_s else 0

    def add(self, rid: str, tokens: int, due_s: float, pass_tokens: int, now: float) -> None:
        """One more prompt for the engine."""
        self._pass_tokens = pass_tokens
        if not self._computing:
            self._computing.add(rid)
            self._began, self._began_s = OpenPass(tokens, due_s), now
            return
        began = self._began
        if not self._waiting and now <= self._began_s and began.tokens + tokens <= pass_tokens:
            self._computing.add(rid)
            self._began = OpenPass(began.tokens + tokens, min(began.due_s, due_s))
            return
        self._waiting[rid] = _Waiting(tokens, due_s)
        self._waiting_tokens += tokens

    def done(self, rid: str) -> None:
        """It had its first token, or is gone. When the whole pass has, the next one has begun."""
        if rid in self._computing:
            self._computing.discard(rid)
            if not self._computing:
                self._begin_next()
        elif rid in self._waiting:
            self._waiting_tokens -= self._waiting.pop(rid).tokens

    def _begin_next(self) -> None:
        self._began_s = -inf
        if not self._waiting:
            return
        tokens = 0
        while self._waiting:
            rid, first = next(iter(self._waiting.items()))
            if tokens and tokens + first.tokens > self._pass_tokens:
                break
            tokens += first.tokens
            del self._waiting[rid]
            self._computing.add(rid)
        self._waiting_tokens -= tokens


class PrefillBacklog:
    """Fed with what is released and with first tokens; keeps no clock: `now` never goes back.

    Prefill that ends earlier than was thought frees the GPU at once. Prefill that takes longer than was
    thought holds nobody up beyond its time: estimates, not engines, bound what is released.
    """

    def __init__(self) -> None:
        self._pending: dict[str, _Pending] = {}
        self._pending_s = 0.0
        self._until_s = 0.0
        self._recent: deque[_Released] = deque()
        self._recent_s = 0.0
        self._recent_overaged_s = 0.0
        self._passes: dict[str, _Passes] = {}

    def released(
        self,
        rid: str,
        model: str,
        tokens: int,
        cost: PrefillCost,
        now: float,
        *,
        due_s: float = inf,
        overaged: bool = False,
    ) -> None:
        """A prompt of so many tokens, whose first token is due at `due_s`, went to its model's engine."""
        of_model = self._passes.get(model)
        if of_model is None:
            of_model = self._passes[model] = _Passes()
        seconds = cost.joining_s(tokens, of_model.open_tokens(now))
        until_s = self._until_s
        self._until_s = until_s = (until_s if until_s > now else now) + seconds
        of_model.add(rid, tokens, due_s if until_s <= due_s else inf, cost.pass_tokens, now)
        self._pending[rid] = _Pending(model, seconds)
        self._pending_s += seconds
        self._recent.append(_Released(until_s, seconds, overaged))
        self._recent_s += seconds
        if overaged:
            self._recent_overaged_s += seconds

    def prefilled(self, rid: str, now: float) -> None:
        """It had its first token, or is gone; unknown ones are no news."""
        pending = self._pending.pop(rid, None)
        if pending is None:
            return
        self._pending_s = self._pending_s - pending.seconds if self._pending else 0.0
        until_s = now + self._pending_s
        if until_s < self._until_s:
            self._until_s = until_s
        self._passes[pending.model].done(rid)

    def open_pass(self, model: str, now: float) -> OpenPass:
        """What waits for this model's engine and has not begun: a prompt that is released now joins it."""
        of_model = self._passes.get(model)
        return CLOSED if of_model is None else of_model.open(now)

    def work(self, now: float) -> GpuWork:
        """As of `now`."""
        recent = self._recent
        while recent and recent[0].ends_s <= now - PREFILL_WINDOW_S:
            gone = recent.popleft()
            self._recent_s -= gone.seconds
            if gone.overaged:
                self._recent_overaged_s -= gone.seconds
        if not recent:
            self._recent_s = self._recent_overaged_s = 0.0
        return GpuWork(self._until_s, self._recent_s, self._recent_overaged_s)
