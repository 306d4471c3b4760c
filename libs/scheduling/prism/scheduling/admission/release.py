"""Releasing requests one by one, in an order that a policy chose, within what engines and the GPU can take.

**One prefill budget.** Engines are processes of their own and would all prefill at once. Requests are
released only while less than `lookahead_s` of prefill lies ahead of the GPU, so that the order in which they
are released is the order in which they are prefilled.

**Passes.** Prompts that an engine has been given and has not begun with are prefilled in one pass (see
`prefill_cost`). One that joins them costs its tokens alone, so it may go beyond the lookahead: while what
lies ahead takes no longer than `fixed_parts` times the fixed part of the pass. So where prompts are short at
most one in `fixed_parts` seconds of prefill is not spent on tokens, and whoever comes next waits for that
long at worst. The first tokens of a pass come together, at its end: a prompt that would make one late that
can be on time waits for the next pass.

**Memory.** A request starts when its engine's free KV tokens hold its prompt and its expected output. One
that does not fit yet holds up those of its model that come after it, so that a large one is not overtaken
for ever. An engine that runs nothing takes one request whatever its size: waiting would make no more room.

**Decode.** While an engine decodes under a promise of T seconds a token, at s seconds a step, prefill takes
at most 1 - s/T of the GPU's time (the least such share of all engines, over PREFILL_WINDOW_S): n steps then
take n*s of decode time within n*T seconds. A prefill that alone is more than that goes when there was none
lately. Whoever must not wait (it would be late for that, or has waited beyond its bound) is `urgent` and
goes all the same: decode is protected as long as there is slack elsewhere.

With a `DecodeRoom` an engine that runs nothing begins only where all engines then keep their promises: being
late is worse for one request than for all that decode. While some have waited beyond their bound, one engine
more is kept free for them; who has waited four times that long goes as the only one too many. Where more work
already than can keep their promises, those longest at work make way for it: they take no younger ones, run
dry, and take their turn again. So nobody waits for ever.
"""

import enum
from collections.abc import Mapping, Sequence
from math import inf

import msgspec

from prism.scheduling.admission.decode_room import DecodeRoom
from prism.scheduling.admission.policy import (
    PREFILL_WINDOW_S,
    Admission,
    EngineCapacity,
    GpuWork,
    QueuedRequest,
)
from prism.scheduling.admission.prefill_cost import passes

SHORTEST_WAIT_S = 0.001
"""Nobody looks again sooner: at the same instant there would be the same decision."""
PRESSING = 4
"""Who has waited so many times its bound goes as the only one too many, or has others make way."""
LOOK_FOR_ROOM_S = 1.0
"""When to look again whether an engine that was held back may begin. Nothing need happen for that: prefill's
share of the time falls, and waits exceed their bounds."""


class PrefillBudget(msgspec.Struct, frozen=True):
    """How prefill is bounded on one GPU: seconds of it that may lie ahead, for passes that are still open as
    many times their fixed part, and the share of the GPU's time that it may always have, whatever decoding
    engines were promised."""

    lookahead_s: float = 0.05
    least_share: float = 0.1
    fixed_parts: float = 12.0

    def filled_s(self, fixed_s: float) -> float:
        """Seconds of prefill that may lie ahead when a prompt joins a pass with this fixed part."""
        return max(self.lookahead_s, self.fixed_parts * fixed_s)

    def nothing_yet(
        self, queue: Sequence[QueuedRequest], engines: Mapping[str, EngineCapacity], gpu: GpuWork, now: float
    ) -> Admission | None:
        """The decision where nobody waits, or as much prefill lies ahead as may; else None.

        An open pass is looked at when half of what it may have lies ahead: prompts then join it together, not
        one by one as time passes.
        """
        if not queue:
            return Admission([])
        ahead_s = self.lookahead_s
        if gpu.prefill_until_s - ahead_s < now:
            return None
        for engine in engines.values():
            if engine.open_tokens:
                ahead_s = max(ahead_s, self.filled_s(engine.prefill_fixed_s) / 2)
        full_until_s = gpu.prefill_until_s - ahead_s
        return Admission([], max(full_until_s, now + SHORTEST_WAIT_S)) if full_until_s >= now else None


class Offer(enum.Enum):
    """What came of offering a request: it started, it can't yet, prefill has to wait for decode, or nothing
    more can start now."""

    STARTED = enum.auto()
    BLOCKED = enum.auto()
    HELD = enum.auto()
    FULL = enum.auto()


# As plain globals: an attribute of an enumeration costs a quarter of a whole offer.
STARTED, BLOCKED, HELD, FULL = Offer.STARTED, Offer.BLOCKED, Offer.HELD, Offer.FULL
STOPPED = (HELD, FULL)


class _Left:
    """What is left of one engine, and its open pass: how many tokens it has, when the first of those that can
    be on time is due, and up to how much prefill ahead prompts may join it. It takes those only that came at
    `youngest_s` at the latest."""

    __slots__ = (
        "engine",
        "filled_s",
        "fixed_s",
        "idle",
        "kv_tokens",
        "open_due_s",
        "open_tokens",
        "slots",
        "youngest_s",
    )

    def __init__(self, engine: EngineCapacity, filled_s: float) -> None:
        self.engine = engine
        self.slots = engine.max_running - engine.running if engine.accepting else 0
        self.kv_tokens = engine.kv_free_tokens
        self.idle = engine.running == 0
        self.fixed_s = engine.prefill_fixed_s
        self.open_tokens = engine.open_tokens
        self.open_due_s = engine.open_due_s
        self.filled_s = filled_s
        self.youngest_s = inf


class Release:
    """One decision in the making. `until_s` is when all prefill released so far is done. `engines_kept_free`
    may not begin for requests that are not overaged."""

    __slots__ = (
        "_allowed_s",
        "_budget",
        "_decode_room",
        "_left",
        "_now",
        "_spent_s",
        "again_at_s",
        "engines",
        "engines_kept_free",
        "rids",
        "until_s",
    )

    def __init__(
        self,
        engines: Mapping[str, EngineCapacity],
        gpu: GpuWork,
        now: float,
        budget: PrefillBudget,
        decode_room: DecodeRoom | None = None,
    ) -> None:
        self.rids: list[str] = []
        self.again_at_s: float | None = None
        self.until_s = gpu.prefill_until_s if gpu.prefill_until_s > now else now
        self.engines = engines
        self._now = now
        self._budget = budget
        self._decode_room = decode_room
        self.engines_kept_free = 0
        self._left: dict[str, _Left] = {}
        self._spent_s = gpu.recent_prefill_s
        self._allowed_s: float | None = None

    def offer(self, request: QueuedRequest, *, urgent: bool = False, bounds_waited: int = 0) -> Offer:
        """Start `request` if it can be; it has waited so many times its bound. After HELD, offer it again as
        urgent or let it wait; after FULL only what `joins` an open pass is worth offering. `again_at_s` says
        then when to look again."""
        left = self._of(request.model)
        ahead = self.until_s - self._now
        full = ahead >= self._budget.lookahead_s
        if left is None or left.slots <= 0 or request.arrival_s > left.youngest_s:
            return self._full() if full else BLOCKED
        engine = left.engine
        held, tokens = left.open_tokens, request.prompt_tokens
        opened = passes(held + tokens, engine.pass_tokens) - passes(held, engine.pass_tokens)
        seconds = opened * left.fixed_s + tokens / engine.prefill_tokens_per_s
        if full and (opened or ahead + seconds > left.filled_s):
            return self._full()
        until_s = self.until_s + seconds
        makes_late = left.fixed_s > 0 and not opened and self.until_s <= left.open_due_s < until_s
        if makes_late and not bounds_waited:
            # The pass begins at once, or with the first tokens that the engine brings next.
            self.look_again(self.until_s if engine.open_tokens else self._now)
            return self._full() if full else BLOCKED
        kv_tokens = request.tokens
        if kv_tokens > left.kv_tokens and not left.idle:
            left.slots = 0
            return BLOCKED
        if left.idle and self._decode_room is not None and not self._may_begin(engine, bounds_waited):
            self.look_again(self._now + LOOK_FOR_ROOM_S)
            return BLOCKED
        if self._spent_s > 0 and not urgent:
            beyond = self._spent_s + seconds - self._allowed()
            if beyond > 0:
                # The window forgets a second of prefill in a second at best.
                self.again_at_s = self._now + min(beyond, self._spent_s)
                return HELD
        left.slots -= 1
        left.kv_tokens -= kv_tokens
        if left.idle:
            left.idle = False
            if self._decode_room is not None:
                self._decode_room.begins(engine)
        if opened:
            left.open_due_s = inf
        if until_s <= request.first_token_due_s < left.open_due_s:
            left.open_due_s = request.first_token_due_s
        left.open_tokens = held + tokens
        self.until_s = until_s
        self._spent_s += seconds
        self.rids.append(request.rid)
        return STARTED

    def joins(self, request: QueuedRequest) -> bool:
        """Whether `request` could go in a pass that is open, and so save a fixed part."""
        left = self._of(request.model)
        if left is None or left.slots <= 0 or not left.open_tokens or not left.fixed_s:
            return False
        held, most = left.open_tokens, left.engine.pass_tokens
        return passes(held + request.prompt_tokens, most) == passes(held, most)

    @property
    def open_models(self) -> list[str]:
        """Models that have a pass open."""
        return [
            model
            for model, engine in self.engines.items()
            if engine.prefill_fixed_s
            and (self._left[model].open_tokens if model in self._left else engine.open_tokens)
        ]

    def joining_s(self, request: QueuedRequest) -> float:
        """What `request` adds to an open pass, in seconds."""
        return request.prompt_tokens / self.engines[request.model].prefill_tokens_per_s

    def _of(self, model: str) -> _Left | None:
        left = self._left.get(model)
        if left is None:
            engine = self.engines.get(model)
            if engine is None:
                return None
            filled_s = self._budget.filled_s(engine.prefill_fixed_s)
            left = self._left[model] = _Left(engine, filled_s)
        return left

    def _full(self) -> Offer:
        half_s = max((left.filled_s / 2 for left in self._left.values() if left.open_tokens), default=0.0)
        # Half of a pass ahead is time enough for others to join it, all at once.
        self.again_at_s = self.until_s - max(self._budget.lookahead_s, half_s)
        if self.again_at_s <= self._now:
            self.again_at_s = self.until_s - self._budget.lookahead_s
        return FULL

    def _may_begin(self, engine: EngineCapacity, bounds_waited: int) -> bool:
        room = self._decode_room
        assert room is not None
        if not bounds_waited:
            return room.has_room(engine, self.engines_kept_free)
        return room.has_room(engine) or (bounds_waited >= PRESSING and not room.too_many)

    def make_way(self, request: QueuedRequest, engines: int) -> None:
        """Have so many engines, those longest at work, run dry for `request`, which came before those that
        they may not take from now on; nor do others begin with such."""
        at_work = sorted((each.busy_since_s, model) for model, each in self.engines.items() if each.running)
        staying = {request.model} | {model for _, model in at_work[engines:]}
        for model in self.engines.keys() - staying:
            if (left := self._of(model)) is not None:
                left.youngest_s = request.arrival_s

    def offer_alive(self, request: QueuedRequest) -> Offer:
        """As `offer`; one whose deadline has passed is blocked."""
        return self.offer(request) if request.deadline_s > self._now else BLOCKED

    def look_again(self, at_s: float) -> None:
        """Look again at `at_s` at the latest."""
        self.again_at_s = at_s if self.again_at_s is None else min(self.again_at_s, at_s)

    def _allowed(self) -> float:
        if self._allowed_s is None:
            share = prefill_share(self.engines)
            least = self._budget.least_share
            self._allowed_s = inf if share >= 1 else PREFILL_WINDOW_S * max(least, share)
        return self._allowed_s

    def admission(self) -> Admission:
        """What was started."""
        again_at_s = self.again_at_s
        if again_at_s is not None:
            again_at_s = max(again_at_s, self._now + SHORTEST_WAIT_S)
        return Admission(self.rids, again_at_s)


def prefill_share(engines: Mapping[str, EngineCapacity]) -> float:
    """The share of the GPU's time that prefill may take for every decoding engine to keep its promise; 1
    without promises, 0 or less when one can't be kept."""
    share = 1.0
    for engine in engines.values():
        if engine.decoding and engine.tpot_slo_s < inf:
            share = min(share, 1.0 - engine.decode_step_s / engine.tpot_slo_s)
    return share
