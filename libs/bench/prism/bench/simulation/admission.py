"""The queue of a GPU before its engines: the real admission policies decide who goes when.

The requests of an instance that is spread over several GPUs queue at its first.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prism.bench.simulation.engine import Request
from prism.bench.simulation.events import EventQueue
from prism.scheduling.admission import (
    SHORTEST_WAIT_S,
    AdmissionPolicy,
    Bounds,
    EngineCapacity,
    PrefillBacklog,
    PrefillCost,
    QueuedRequest,
)

if TYPE_CHECKING:
    from prism.bench.simulation.instance import Instance

BOUNDS = Bounds()
NEAR = 0.8
"""An engine whose requests may take this share of its quota is about to want more."""


class AdmissionQueue:
    """What waits for the engines of one GPU. `prefills` counts requests released whose prefill is not
    done."""

    __slots__ = (
        "_again_at",
        "_backlog",
        "_deadline_s",
        "_events",
        "_max_running",
        "_policy",
        "_release",
        "_tight",
        "decisions",
        "entries",
        "instances",
        "most",
        "prefills",
        "waiting",
    )

    def __init__(
        self,
        policy: AdmissionPolicy,
        events: EventQueue,
        release: "Callable[[Instance, Sequence[Request], float], None]",
        tight: "Callable[[Instance, float], None]",
        *,
        max_running: int,
        deadline_s: float,
    ) -> None:
        self._policy = policy
        self._events = events
        self._release = release
        self._tight = tight
        self._max_running = max_running
        self._deadline_s = deadline_s
        self._again_at = float("inf")
        self.instances: dict[str, Instance] = {}
        self.entries: dict[str, QueuedRequest] = {}
        self.waiting: dict[str, tuple[Request, Instance]] = {}
        self._backlog = PrefillBacklog()
        self.prefills = 0
        self.decisions = 0
        self.most = 0

    def arrive(self, instance: "Instance", request: Request, expected: int, now: float) -> None:
        """A request for `instance`, which will probably generate `expected` tokens beyond those it has."""
        request.queued_s = now
        request.reserved = tokens = request.prompt + request.got + expected
        if (
            not self.waiting
            and not self.prefills
            and not instance.gpus[0].computing
            and (
                instance.running == 0
                or (
                    tokens <= instance.quota_tokens - instance.reserved
                    and instance.running < self._max_running
                )
            )
        ):
            # The GPU has nothing to do and the request has room: no policy could do but start it
            # (tests/bench/simulation/test_admission.py asks all of them).
            self._started(instance, request, now)
            self._release(instance, (request,), now)
            return
        rid = request.rid
        model = instance.model
        self.entries[rid] = QueuedRequest(
            rid,
            model.name,
            now if request.got else request.arrival_s,
            request.prompt + request.got,
            max(1, model.max_new_tokens - request.got),
            request.arrival_s + self._deadline_s,
            model.spec.priority,
            model.ttft_slo_s,
            expected,
        )
        self.waiting[rid] = (request, instance)
        instance.queued += 1
        instance.queued_tokens += tokens
        if len(self.waiting) > self.most:
            self.most = len(self.waiting)
        self.pump(now)

    def pump(self, now: float) -> None:
        """Release what the policy lets start now."""
        if not self.entries:
            return
        self.decisions += 1
        entries = self.entries
        capacities = {name: self._capacity(instance, now) for name, instance in self.instances.items()}
        admission = self._policy.select(list(entries.values()), capacities, self._backlog.work(now), now)
        together: dict[str, list[Request]] = {}
        for rid in admission.rids:
            del entries[rid]
            request, instance = self.waiting.pop(rid)
            instance.queued -= 1
            instance.queued_tokens -= request.reserved
            self._started(instance, request, now)
            together.setdefault(instance.model.name, []).append(request)
        for name, requests in together.items():
            self._release(self.instances[name], requests, now)
        if not entries:
            return
        for instance in self.instances.values():
            if instance.queued and instance.reserved + instance.queued_tokens > instance.quota_tokens:
                self._tight(instance, now)
        again = admission.again_at_s
        if again is not None and again < self._again_at:
            self._again_at = max(again, now + SHORTEST_WAIT_S)
            self._events.at(self._again_at, self._again)

    def _capacity(self, instance: "Instance", now: float) -> EngineCapacity:
        engine = instance.engine
        assert engine is not None
        decoding, alone_s = len(engine.ends), engine.step_s
        # As measured: engines that decode on its GPUs take turns.
        step_s = 0.0
        if decoding:
            gpus = engine.gpus
            step_s = alone_s * (gpus[0].turns if len(gpus) == 1 else max([gpu.turns for gpu in gpus]))
        waiting = self._backlog.open_pass(instance.model.name, now)
        return EngineCapacity(
            instance.running,
            self._max_running,
            instance.quota_tokens - instance.reserved,
            True,
            1.0 / (engine.prefill_token_s * engine.slowdown),
            engine.prefill_fixed_s * engine.slowdown,
            decoding,
            step_s,
            instance.model.tpot_slo_s,
            alone_s,
            engine.chunk_tokens,
            waiting.tokens,
            waiting.due_s,
            instance.busy_since,
        )

    def _again(self, now: float) -> None:
        # An earlier look has replaced any other.
        if now == self._again_at:
            self._again_at = float("inf")
            self.pump(now)

    def _started(self, instance: "Instance", request: Request, now: float) -> None:
        engine = instance.engine
        assert engine is not None
        slowdown = engine.slowdown
        cost = PrefillCost(
            engine.prefill_fixed_s * slowdown, engine.prefill_token_s * slowdown, engine.chunk_tokens
        )
        slo = instance.model.ttft_slo_s
        own_s = (request.prompt + request.got) * cost.token_s
        overaged = now - request.arrival_s >= BOUNDS.of(slo, own_s)
        self._backlog.released(
            request.rid,
            instance.model.name,
            request.prompt + request.got,
            cost,
            now,
            due_s=(now if request.got else request.arrival_s) + slo,
            overaged=overaged,
        )
        self.prefills += 1
        if not instance.running:
            instance.busy_since = now
        instance.running += 1
        instance.reserved += request.reserved
        if instance.reserved > NEAR * instance.quota_tokens:
            self._tight(instance, now)

    def prefilled(self, requests: Sequence[Request], now: float) -> None:
        """The prefill of these is done, or will not be."""
        for request in requests:
            self._backlog.prefilled(request.rid, now)
        self.prefills = max(0, self.prefills - len(requests))
        if self.entries:
            self.pump(now)

    def take_out(self, instance: "Instance") -> list[Request]:
        """All that waits here for `instance`; it waits here no longer."""
        rids = [rid for rid, (_, where) in self.waiting.items() if where is instance]
        out = []
        for rid in rids:
            del self.entries[rid]
            request, _ = self.waiting.pop(rid)
            self._unqueue(instance, request)
            out.append(request)
        return out

    def expire(self, now: float) -> list[tuple[Request, "Instance"]]:
        """Drop what is past its deadline, and say what."""
        gone = [rid for rid, entry in self.entries.items() if entry.deadline_s <= now]
        out = []
        for rid in gone:
            del self.entries[rid]
            request, instance = self.waiting.pop(rid)
            self._unqueue(instance, request)
            out.append((request, instance))
        return out

    def _unqueue(self, instance: "Instance", request: Request) -> None:
        instance.queued -= 1
        instance.queued_tokens -= request.reserved
