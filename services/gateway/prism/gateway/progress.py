"""Runs the choices of a plan: pieces of text out of tokens, with what the metrics want to know on the way."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Protocol

from prism.common.errors import PrismError
from prism.gateway.demand import Demand
from prism.gateway.dispatch import Dispatcher, Job, Tokens
from prism.gateway.metrics import Metrics
from prism.gateway.plan import Choice, Plan
from prism.gateway.text_assembler import Piece, TextAssembler


class PieceSink(Protocol):
    """Where pieces go: each is taken at once, and what was taken goes out together."""

    def take(self, index: int, choice: Choice, piece: Piece) -> None:
        """A `piece` that has just been added to the choice `index`."""

    async def flush(self) -> None:
        """All that is there now has been taken; waits while the client is behind."""


class ChoiceRunner:
    """Runs plans. `clock` gives seconds."""

    def __init__(
        self, dispatcher: Dispatcher, demand: Demand, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._dispatcher = dispatcher
        self._demand = demand
        self._metrics = metrics
        self._clock = clock

    async def run(self, plan: Plan, arrived: float, sink: PieceSink) -> None:
        """Run all choices at once and give each piece to `sink`, after it was added to its choice.

        `arrived` is when the request came in. The first choice that fails ends all: raises its PrismError.
        """
        for choice in plan.choices:
            self._demand.arrived(choice.job.model, len(choice.job.input_ids))
            self._metrics.prompt(choice.job.model, len(choice.job.input_ids))
        if len(plan.choices) == 1:
            await self._run_one(plan, 0, arrived, sink)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(len(plan.choices)):
                    tasks.create_task(self._run_one(plan, index, arrived, sink))
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _run_one(self, plan: Plan, index: int, arrived: float, sink: PieceSink) -> None:
        choice = plan.choices[index]
        behind = choice.job.input_ids if plan.continues else ()
        assembler = TextAssembler(plan.model.tokenizer, plan.stops, behind)
        timing = _Timing(choice.job, arrived, self._metrics)
        try:
            async with aclosing(self._dispatcher.run(choice.job)) as batches:
                async for parts in batches:
                    now = self._clock()
                    for part in parts:
                        timing.saw(part, now)
                        piece = assembler.push(part.tokens, part.logprobs, part.finish)
                        choice.add(piece)
                        sink.take(index, choice, piece)
                        if piece.ending is not None:
                            break
                    await sink.flush()
                    if choice.ending is not None:
                        break
        except PrismError:
            timing.failed()
            raise
        timing.ended()


class _Timing:
    """Observes one generation for the metrics."""

    def __init__(self, job: Job, arrived: float, metrics: Metrics) -> None:
        self._job = job
        self._arrived = arrived
        self._metrics = metrics
        self._counted = metrics.tokens(job.model)
        self._first: float | None = None
        self._last = arrived
        self._tokens = 0

    def saw(self, part: Tokens, now: float) -> None:
        if not part.tokens:
            return
        count = len(part.tokens)
        self._counted.generated += count
        if self._first is None:
            self._first = now
            self._metrics.first_token(self._job.model, now - self._arrived)
        else:
            self._counted.interval((now - self._last) / count)
        self._last = now
        self._tokens += count

    def ended(self) -> None:
        if self._first is None:
            return
        if self._job.ttft_slo_ms is not None:
            took_ms = (self._first - self._arrived) * 1000
            self._metrics.objective(self._job.model, "ttft", took_ms <= self._job.ttft_slo_ms)
        if self._job.tpot_slo_ms is not None and self._tokens > 1:
            took_ms = (self._last - self._first) / (self._tokens - 1) * 1000
            self._metrics.objective(self._job.model, "tpot", took_ms <= self._job.tpot_slo_ms)

    def failed(self) -> None:
        if self._job.ttft_slo_ms is not None:
            self._metrics.objective(self._job.model, "ttft", False)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to tell of several failures: the first that is meant for the client, else the first."""
    flat: list[BaseException] = []
    for error in group.exceptions:
        flat.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in flat if isinstance(error, PrismError)), flat[0])
