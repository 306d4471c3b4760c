"""The simulation itself: requests arrive, are routed, wait, are computed and end, each exactly once."""

import gc
from array import array
from collections import deque
from collections.abc import Sequence
from heapq import heappop
from math import nan

import msgspec

from prism.bench.simulation.admission import AdmissionQueue
from prism.bench.simulation.engine import PREFILL, Engine, Request
from prism.bench.simulation.events import EventQueue
from prism.bench.simulation.gpu import Gpu
from prism.bench.simulation.instance import Instance
from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.placement import PlacementShell, SimulatedWorker
from prism.bench.simulation.quotas import QuotaShell
from prism.bench.traces.trace import Trace
from prism.common.messages.models import ModelState
from prism.scheduling.admission import AdmissionPolicy
from prism.scheduling.admission.expected_output import ExpectedOutput
from prism.scheduling.cost import GpuProfile
from prism.scheduling.placement import PlacementPolicy
from prism.scheduling.traffic import TrafficWindow

NOT_YET = nan


class Limits(msgspec.Struct, frozen=True):
    """What the services are configured with. Seconds: between two plans without an event, between two that
    look at balance, until a request is given up. `gpus_per_worker` None: one, or as many as the largest model
    needs. `staged`: weights are in host memory from the start. `elastic`: KV quotas follow demand."""

    plan_interval_s: float = 1.0
    balance_interval_s: float = 5.0
    deadline_s: float = 600.0
    max_running: int = 256
    chunk_tokens: int = 8192
    gpus_per_worker: int | None = None
    staged: bool = True
    elastic: bool = True
    freezes: bool = True


class Outcome(msgspec.Struct):
    """What came of each request of a trace (by its index): seconds to the first token, seconds a token after
    it; nan where it was not served. Then counts by model, and of the whole."""

    trace: Trace
    models: Sequence[SimulatedModel]
    ttft_s: "array[float]"
    tpot_s: "array[float]"
    ended: "array[int]"
    activations: list[int]
    migrations: list[int]
    active_s: list[float]
    held_gpu_s: float
    busy_gpu_s: float
    end_s: float
    plans: int
    decisions: int
    longest_queue: int
    retracted: int
    failed_commands: int
    notes: dict[str, str]


class Simulation:
    """One run of `trace`, whose models are `models` by index, on `gpus` GPUs of `gpu_memory_bytes`."""

    def __init__(
        self,
        trace: Trace,
        models: Sequence[SimulatedModel],
        *,
        gpus: int,
        gpu_memory_bytes: int,
        profile: GpuProfile,
        placement: PlacementPolicy,
        admission: AdmissionPolicy,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self.trace = trace
        self.models = models
        self._limits = limits
        self._events = EventQueue()
        self.gpus = [
            Gpu(index, gpu_memory_bytes, profile.parallel_engines, profile.prefill_parallel_engines)
            for index in range(gpus)
        ]
        self._quotas = QuotaShell(self._events, elastic=limits.elastic)
        self._queues = [
            AdmissionQueue(
                admission,
                self._events,
                self._release,
                self._quotas.wanted,
                max_running=limits.max_running,
                deadline_s=limits.deadline_s,
            )
            for _ in self.gpus
        ]
        self._parked: list[deque[Request]] = [deque() for _ in models]
        self._windows = [TrafficWindow() for _ in models]
        self._outputs = [ExpectedOutput() for _ in models]
        self._ttft = array("d", [NOT_YET]) * len(trace)
        self._tpot = array("d", [NOT_YET]) * len(trace)
        self._ended = array("b", [0]) * len(trace)
        self._left = len(trace)
        self.placement = PlacementShell(
            placement,
            models,
            self._workers(gpus),
            profile,
            self._events,
            quotas=self._quotas,
            queue_of=lambda gpu: self._queues[gpu.index],
            on_active=self._on_active,
            on_gone=self._on_gone,
            parked=self._parked,
            windows=self._windows,
            chunk_tokens=limits.chunk_tokens,
            balance_interval_s=limits.balance_interval_s,
            staged=limits.staged,
            freezes=limits.freezes,
        )

    def _workers(self, gpus: int) -> list[SimulatedWorker]:
        size = self._limits.gpus_per_worker or max((model.spec.tp_size for model in self.models), default=1)
        return [
            SimulatedWorker(f"worker-{start // size}", self.gpus[start : start + size])
            for start in range(0, gpus, size)
        ]

    def run(self) -> Outcome:
        """Simulate until every request has ended."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.placement.settle()
            self._events.at(self._limits.plan_interval_s, self._tick)
            end = self._loop()
        finally:
            if collecting:
                gc.enable()
        return self._outcome(end)

    def _loop(self) -> float:
        heap, trace = self._events.heap, self.trace
        arrivals, model_of = trace.arrival_s, trace.model
        prompts, outputs = trace.prompt_tokens, trace.output_tokens
        windows, serving = self._windows, self.placement.serving
        count, position, now = len(trace), 0, 0.0
        upcoming = arrivals[0] if count else float("inf")
        while self._left:
            if position < count and (not heap or upcoming <= heap[0][0]):
                now = upcoming
                model = model_of[position]
                request = Request(position, model, now, prompts[position], outputs[position])
                windows[model].arrived(now, request.prompt)
                position += 1
                upcoming = arrivals[position] if position < count else float("inf")
                if len(serving[model]) == 1:
                    self._enqueue(serving[model][0], request, now)
                else:
                    self._route(request, now)
                continue
            now, _, what, engine, version = heappop(heap)
            if what is not None:
                what(now)
            elif engine is not None and engine.version == version:
                self._engine_ended(engine, now)
        return now

    def _route(self, request: Request, now: float) -> None:
        """To the least loaded instance; parked, and the scheduler told, when there is none."""
        instances = self.placement.serving[request.model]
        if not instances:
            self._parked[request.model].append(request)
            self.placement.plan_soon(now)
            return
        self._enqueue(min(instances, key=lambda each: each.load), request, now)

    def _enqueue(self, instance: Instance, request: Request, now: float) -> None:
        expected = self._outputs[request.model].remaining(instance.model.max_new_tokens, request.got)
        assert instance.queue is not None
        instance.queue.arrive(instance, request, max(1, expected), now)

    def _release(self, instance: Instance, requests: Sequence[Request], now: float) -> None:
        assert instance.engine is not None
        instance.engine.take(requests, now)

    def _engine_ended(self, engine: Engine, now: float) -> None:
        prefilled = engine.batch if engine.mode == PREFILL else None
        done = engine.ended(now)
        instance: Instance = engine.owner
        queue = instance.queue if instance.queue is not None else self._queues[instance.gpus[0].index]
        for request in done:
            self._finish(instance, request, now)
        if prefilled:
            queue.prefilled(prefilled, now)
        elif done and queue.entries:
            queue.pump(now)

    def _finish(self, instance: Instance, request: Request, now: float) -> None:
        index = request.index
        self._ttft[index] = request.first_s - request.arrival_s + instance.model.cost.request_s
        output = request.output
        self._tpot[index] = (now - request.first_s) / (output - 1) if output > 1 else 0.0
        self._ended[index] += 1
        self._left -= 1
        model = request.model
        self._windows[model].generated(now, output)
        self._outputs[model].finished(output)
        instance.running -= 1
        instance.reserved -= request.reserved
        if not instance.running and not instance.queued:
            instance.idle_since = now
            if instance.state is ModelState.DRAINING:
                self.placement.drained(instance, now)

    def _on_active(self, instance: Instance, now: float) -> None:
        parked = self._parked[instance.model.index]
        waiting = list(parked)
        parked.clear()
        for request in waiting:
            self._route(request, now)

    def _on_gone(self, requests: list[Request], now: float) -> None:
        for request in requests:
            self._route(request, now)

    def _tick(self, now: float) -> None:
        self._expire(now)
        self.placement.plan(now)
        if self._left:
            self._events.at(now + self._limits.plan_interval_s, self._tick)

    def _expire(self, now: float) -> None:
        """Requests that have waited beyond all patience end without an answer."""
        oldest = now - self._limits.deadline_s
        for parked in self._parked:
            while parked and parked[0].arrival_s <= oldest:
                self._give_up(parked.popleft())
        for queue in self._queues:
            if queue.entries:
                for request, _ in queue.expire(now):
                    self._give_up(request)

    def _give_up(self, request: Request) -> None:
        self._ended[request.index] += 1
        self._left -= 1

    def _outcome(self, end: float) -> Outcome:
        shell = self.placement
        for gpu in self.gpus:
            gpu.settle(end)
        retracted = shell.retracted + sum(
            instance.engine.retracted for each in shell.serving for instance in each if instance.engine
        )
        return Outcome(
            self.trace,
            self.models,
            self._ttft,
            self._tpot,
            self._ended,
            shell.activations,
            shell.migrations,
            shell.active_gpu_s(end),
            sum(gpu.held_s for gpu in self.gpus),
            sum(gpu.busy_s for gpu in self.gpus),
            end,
            shell.plans,
            sum(queue.decisions for queue in self._queues),
            max((queue.most for queue in self._queues), default=0),
            retracted,
            shell.failed,
            shell.notes,
        )
