"""One engine's continuous batching, advanced analytically: a step's time is constant between changes of the
batch, so only those changes are events.

As SGLang does it: prompts that wait are prefilled together, up to a chunk of tokens, before decoding goes on;
decoding gives each sequence a token a step. Engines that compute on a GPU at once share it evenly, those that
prefill as far as its profile says.
"""

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, floor
from typing import Any

from prism.bench.simulation.events import EventQueue
from prism.bench.simulation.gpu import Gpu
from prism.scheduling.cost import ModelCost

IDLE, PREFILL, DECODE = 0, 1, 2
ROUNDING = 1e-7
SLOWDOWN_WEIGHT = 0.2


class Request:
    """A request on its way. `first_s` is when its first token came (below 0: not yet), `got` how many tokens
    it had when its present engine took it, `reserved` the KV tokens that admission counts on."""

    __slots__ = (
        "arrival_s",
        "first_s",
        "got",
        "index",
        "model",
        "output",
        "prompt",
        "queued_s",
        "reserved",
        "rid",
    )

    def __init__(self, index: int, model: int, arrival_s: float, prompt: int, output: int) -> None:
        self.index = index
        self.rid = str(index)
        self.model = model
        self.arrival_s = arrival_s
        self.prompt = prompt
        self.output = output
        self.first_s = -1.0
        self.got = 0
        self.reserved = 0
        self.queued_s = arrival_s


class Engine:
    """One instance of a model on its GPUs.

    `v` counts decode steps: a sequence that enters at v0 with n tokens to come leaves at v0 + n. KV tokens
    held by the `ends` (a heap by that) are kv_base + len(ends) * v. Times and costs in seconds.
    """

    __slots__ = (
        "at",
        "batch",
        "blocked",
        "chunk_tokens",
        "decode_fixed_s",
        "decode_kv_s",
        "decode_sequence_s",
        "ends",
        "events",
        "gpus",
        "kv_base",
        "mode",
        "owner",
        "prefill_began",
        "prefill_fixed_s",
        "prefill_share",
        "prefill_token_s",
        "prefill_work_s",
        "quota_tokens",
        "rate",
        "retracted",
        "share",
        "slowdown",
        "target",
        "v",
        "version",
        "waiting",
        "work",
    )

    def __init__(
        self,
        gpus: tuple[Gpu, ...],
        cost: ModelCost,
        events: EventQueue,
        *,
        quota_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self.gpus = gpus
        self.owner: Any = None
        self.events = events
        self.prefill_fixed_s = cost.prefill_fixed_s
        self.prefill_token_s = cost.prefill_token_s
        self.decode_fixed_s = cost.decode_fixed_s
        self.decode_sequence_s = cost.decode_sequence_s
        self.decode_kv_s = cost.decode_kv_token_s
        self.quota_tokens = quota_tokens
        self.chunk_tokens = chunk_tokens
        self.mode = IDLE
        self.waiting: deque[Request] = deque()
        self.batch: list[Request] = []
        self.ends: list[tuple[float, int, Request]] = []
        self.kv_base = 0.0
        self.v = 0.0
        self.work = 0.0
        self.rate = 1.0
        self.share = 1.0
        self.prefill_share = 1.0
        self.at = 0.0
        self.target = 0.0
        self.version = 0
        self.retracted = 0
        self.blocked = False
        self.slowdown = 1.0
        self.prefill_began = 0.0
        self.prefill_work_s = 0.0

    @property
    def kv_tokens(self) -> float:
        """KV tokens that its sequences hold as of its last change."""
        held = self.kv_base + len(self.ends) * self.v
        return held + sum(each.prompt + each.got for each in self.batch)

    @property
    def step_s(self) -> float:
        """Seconds of a decode step of its present batch, alone on its GPUs."""
        decoding = len(self.ends)
        held = self.kv_base + decoding * self.v
        sequences = decoding or 1
        if held < 0.0:
            held = 0.0
        return self.decode_fixed_s + sequences * self.decode_sequence_s + held * self.decode_kv_s

    def take(self, requests: Sequence[Request], now: float) -> None:
        """Begin with `requests`, together, as soon as the step under way is over."""
        none_waited = not self.waiting
        self.waiting.extend(requests)
        if self.mode == IDLE:
            self.at = now
            for gpu in self.gpus:
                gpu.join(self, now)
            self._share()
            self._begin(now)
        elif self.mode == DECODE and none_waited:
            self.advance(now)
            self.schedule(now)

    def shared_again(self, now: float) -> None:
        """Who else computes on its GPUs has changed."""
        before, prefill_before = self.share, self.prefill_share
        self._share()
        if self.share != before or self.prefill_share != prefill_before:
            self.advance(now)
            self.schedule(now)

    def _share(self) -> None:
        gpus = self.gpus
        if len(gpus) == 1:
            gpu = gpus[0]
            self.share = gpu.shares(len(gpu.computing))
            self.prefill_share = gpu.prefill_shares(len(gpu.computing))
        else:
            self.share = max(gpu.shares(len(gpu.computing)) for gpu in gpus)
            self.prefill_share = max(gpu.prefill_shares(len(gpu.computing)) for gpu in gpus)

    def advance(self, now: float) -> None:
        """Account for what was done until `now`."""
        if self.mode == DECODE:
            self.v += (now - self.at) * self.rate
        elif self.mode == PREFILL:
            self.work -= (now - self.at) * self.rate
        self.at = now

    def schedule(self, now: float) -> None:
        """Put the next change of the batch into the queue of events."""
        version = self.version = self.version + 1
        if self.mode == PREFILL:
            self.rate = 1.0 / self.prefill_share
            work = self.work
            time = now + (work if work > 0.0 else 0.0) * self.prefill_share
        else:
            ends, v = self.ends, self.v
            sequences = len(ends)
            left = ends[0][0] - v
            if self.waiting and not self.blocked:
                boundary = ceil(v - ROUNDING) - v
                if boundary < left:
                    left = boundary
            held = self.kv_base + sequences * v
            if sequences > 1 and held + sequences * left > self.quota_tokens:
                left = max(0.0, floor(v + max(0.0, self.quota_tokens - held) / sequences + ROUNDING) - v)
            if left < 0.0:
                left = 0.0
            step = (
                self.decode_fixed_s
                + sequences * self.decode_sequence_s
                + self.decode_kv_s * (held + sequences * left * 0.5)
            ) * self.share
            self.rate = 1.0 / step
            self.target = v + left
            time = now + left * step
        events = self.events
        heappush(events.heap, (time, events.number(), None, self, version))

    def ended(self, now: float) -> list[Request]:
        """What it did is done: the requests that are complete by that. It has begun with the next."""
        done: list[Request] = []
        self.at = now
        if self.mode == PREFILL:
            v = self.v
            for request in self.batch:
                if request.first_s < 0.0:
                    request.first_s = now
                request.got += 1
                left = request.output - request.got
                if left <= 0:
                    done.append(request)
                else:
                    heappush(self.ends, (v + left, request.index, request))
                    self.kv_base += request.prompt + request.got - v
            self.batch = []
            took, alone = now - self.prefill_began, self.prefill_work_s
            self.slowdown += SLOWDOWN_WEIGHT * (took / alone - self.slowdown) if alone else 0.0
        else:
            v = self.v = self.target
            ends = self.ends
            while ends and ends[0][0] <= v + ROUNDING:
                end, _, request = heappop(ends)
                self.kv_base -= request.prompt + request.output - end
                request.got = request.output
                done.append(request)
            if done:
                self.blocked = False
            elif len(ends) > 1 and self.kv_base + len(ends) * (v + 1) > self.quota_tokens:
                self.retract_one()
        self._begin(now)
        return done

    def retract_one(self) -> None:
        """Take the sequence that came last out of the batch; it is prefilled again, with its tokens, when
        there is room. The engine must not be decoding beyond its last change."""
        latest = max(range(len(self.ends)), key=lambda place: self.ends[place][2].queued_s)
        end, _, request = self.ends[latest]
        self.ends[latest] = self.ends[-1]
        self.ends.pop()
        self.ends.sort()
        request.got = request.output - round(end - self.v)
        self.kv_base -= request.prompt + request.output - end
        self.waiting.append(request)
        self.retracted += 1

    def take_out(self, now: float) -> list[Request]:
        """Stop, and give up all requests, with what they have so far."""
        self.advance(now)
        out = [*self.batch, *self.waiting]
        for end, _, request in sorted(self.ends):
            request.got = request.output - max(1, round(end - self.v))
            out.append(request)
        self.batch, self.ends, self.kv_base = [], [], 0.0
        self.waiting.clear()
        self.version += 1
        self._leave(now)
        return out

    def set_quota(self, quota_tokens: int, now: float) -> None:
        """Hold at most so many KV tokens from now on; what is too much is retracted step by step."""
        grows = quota_tokens > self.quota_tokens
        self.quota_tokens = quota_tokens
        if grows:
            self.blocked = False
        if self.mode == DECODE:
            self.advance(now)
            self.schedule(now)

    def _begin(self, now: float) -> None:
        if self.waiting and not self.blocked and self._fill_batch():
            self.mode = PREFILL
            self.prefill_began, self.prefill_work_s = now, self.work
            self.schedule(now)
        elif self.ends:
            self.mode = DECODE
            self.blocked = bool(self.waiting)
            self.schedule(now)
        else:
            self._leave(now)

    def _fill_batch(self) -> bool:
        """Move what is prefilled next from `waiting` to `batch`. Whether there is any: a sequence that was
        retracted stays out until it fits."""
        waiting, ends = self.waiting, self.ends
        room = self.quota_tokens - (self.kv_base + len(ends) * (self.v + 1)) if ends else float("inf")
        batch = self.batch
        tokens = 0
        while waiting:
            request = waiting[0]
            need = request.prompt + request.got
            if batch and tokens + need > self.chunk_tokens:
                break
            if (ends or batch) and tokens + need + len(batch) + 1 > room:
                break
            batch.append(waiting.popleft())
            tokens += need
        if not batch:
            return False
        passes = 1 if tokens <= self.chunk_tokens else -(-tokens // self.chunk_tokens)
        self.work = passes * self.prefill_fixed_s + tokens * self.prefill_token_s
        return True

    def _leave(self, now: float) -> None:
        if self.mode != IDLE:
            self.mode = IDLE
            self.version += 1
            for gpu in self.gpus:
                gpu.leave(self, now)
