"""Runs the choices of a plan: pieces of text out of tokens, with what the metrics want to know on the way."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from prism.common.errors import PrismError
from prism.gateway.demand import Demand
from prism.gateway.dispatch import Dispatcher, Job, Tokens
from prism.gateway.metrics import Metrics
from prism.gateway.plan import Choice, Plan
from prism.gateway.text_assembler import Piece, TextAssembler

OnPiece = Callable[[int, Choice, Piece], Awaitable[None]]


class ChoiceRunner:
    """Runs plans. `clock` gives seconds."""

    def __init__(
        self, dispatcher: Dispatcher, demand: Demand, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._dispatcher = dispatcher
        self._demand = demand
        self._metrics = metrics
        self._clock = clock

    async def run(self, plan: Plan, arrived: float, on_piece: OnPiece) -> None:
        """Run all choices at once and call `on_piece` for each piece, after it was added to its choice.

        `arrived` is when the request came in. The first choice that fails ends all: raises its PrismError.
        """
        for choice in plan.choices:
            self._demand.arrived(choice.job.model)
            self._metrics.prompt(choice.job.model, len(choice.job.input_ids))
        if len(plan.choices) == 1:
            await self._run_one(plan, 0, arrived, on_piece)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(len(plan.choices)):
                    tasks.create_task(self._run_one(plan, index, arrived, on_piece))
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _run_one(self, plan: Plan, index: int, arrived: float, on_piece: OnPiece) -> None:
        choice = plan.choices[index]
        assembler = TextAssembler(plan.model.tokenizer, plan.stops)
        timing = _Timing(choice.job, arrived, self._metrics)
        try:
            async with aclosing(self._dispatcher.run(choice.job)) as parts:
                async for part in parts:
                    timing.saw(part, self._clock())
                    piece = assembler.push(part.tokens, part.logprobs, part.finish)
                    choice.add(piece)
                    await on_piece(index, choice, piece)
                    if piece.ending is not None:
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
        self._first: float | None = None
        self._last = arrived
        self._tokens = 0

    def saw(self, part: Tokens, now: float) -> None:
        if not part.tokens:
            return
        model = self._job.model
        self._metrics.generated(model, len(part.tokens))
        if self._first is None:
            self._first = now
            self._metrics.first_token(model, now - self._arrived)
        else:
            self._metrics.next_tokens(model, now - self._last, len(part.tokens))
        self._last = now
        self._tokens += len(part.tokens)

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
