"""Commands in flight: sent once, followed until their outcome shows."""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from time import monotonic

import msgspec
import nats.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.common.messages.explain import ExplainedAction
from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.common.telemetry import about
from prism.scheduling.placement.snapshot import InFlight

log = logging.getLogger(__name__)

ANSWER_SLACK_S = 5.0
REPORT_GRACE_S = 1.0
LOST_AFTER_S = 3.0
"""A command that its worker's reports do not name for so long was lost, or its answer was. Either is on its
way for far less, also between processes that are short of CPU time."""
REMEMBERED = 32

# Without an image to wake from, a model that was to sleep ends cold, and its worker answers without an error.
_REACHED = {
    CommandKind.ACTIVATE: {ModelState.ACTIVE},
    CommandKind.DOZE: {ModelState.DOZING, ModelState.COLD},
    CommandKind.FREEZE: {ModelState.FROZEN, ModelState.COLD},
    CommandKind.RELEASE: {ModelState.COLD},
}

OnOutcome = Callable[[Command, CommandOutcome], None]


class _Pending(msgspec.Struct):
    command: Command
    worker: str
    reason: str
    footprint_bytes: int
    sent_at: float
    task: asyncio.Task[None] | None = None
    named: bool = False
    reached_since: float = math.inf
    unknown_since: float = math.inf
    reported_at: float = 0.0
    outcome: CommandOutcome | None = None
    ended_at: float = 0.0

    def reported(self, model: ModelLoad, commanded: list[str] | None, now: float) -> CommandOutcome | None:
        """The outcome that this report and those before it prove, None while there may be another."""
        reached = model.state in _REACHED[self.command.kind]
        unknown = not reached and commanded is not None and model.model not in commanded
        if now - self.reported_at > REPORT_GRACE_S:
            # The first reports after a silence may tell of the time before the command came.
            self.unknown_since = math.inf
        self.reported_at = now
        self.named = self.named or (commanded is not None and model.model in commanded)
        self.reached_since = min(self.reached_since, now) if reached else math.inf
        self.unknown_since = min(self.unknown_since, now) if unknown else math.inf
        if now - self.reached_since >= REPORT_GRACE_S:
            return CommandOutcome(self.worker, model.model, model.state)
        if now - self.unknown_since >= LOST_AFTER_S:
            # What it failed of before this command is not what this one came to.
            failure = model.failure if self.named and self.command.kind is CommandKind.ACTIVATE else None
            why = failure or "the bus lost the command or its answer"
            body = ErrorBody(ErrorCode.INTERNAL, f"not answered, {model.state} now: {why}", retry=True)
            return CommandOutcome(self.worker, model.model, model.state, body)
        return None

    def stop_following(self) -> None:
        if self.task is not None:
            self.task.cancel()


class CommandRunner:
    """Sends commands and keeps each in flight until its outcome is known and visible in load reports.

    The bus may lose a command, or its answer. Reports make up for it: a model seen in the state asked for,
    REPORT_GRACE_S long, has reached it; a command whose model its worker's reports do not name as commanded,
    LOST_AFTER_S long, has failed, and what is wanted is planned anew. The model's state alone would not tell:
    while a command waits for its turn, for room or for an image, it looks as if nothing had been asked.
    Nothing is sent twice: the second copy would start again what failed, behind the backoff's back, or be
    refused because the first is done. A worker that is gone ends its commands.
    """

    def __init__(self, bus: Bus, tasks: asyncio.TaskGroup, on_outcome: OnOutcome) -> None:
        self._bus = bus
        self._tasks = tasks
        self._on_outcome = on_outcome
        self._pending: dict[tuple[str, str], _Pending] = {}
        self._recent: deque[_Pending] = deque(maxlen=REMEMBERED)

    def in_flight(self) -> tuple[InFlight, ...]:
        """All that is under way, as placement policies see it."""
        return tuple(
            InFlight(
                worker,
                model,
                pending.command.kind,
                pending.footprint_bytes,
                tuple(pending.command.gpu_ids),
            )
            for (worker, model), pending in self._pending.items()
        )

    def awaits(self, worker: str, model: str) -> bool:
        """Whether the outcome of a command for this model on this worker is not known yet."""
        pending = self._pending.get((worker, model))
        return pending is not None and pending.outcome is None

    def start(self, worker: str, command: Command, *, footprint_bytes: int, reason: str) -> None:
        """Send `command`; there must be none in flight for this model on this worker."""
        self._begin(worker, command, footprint_bytes, reason)

    async def carry_out(self, worker: str, command: Command, *, reason: str) -> CommandOutcome:
        """As `start`, and wait for the outcome: the command's deadline and some seconds at most."""
        pending = self._begin(worker, command, 0, reason)
        assert pending.task is not None
        await asyncio.wait({pending.task})
        return pending.outcome or CommandOutcome(
            worker,
            command.spec.model_name,
            ModelState.FAILED,
            ErrorBody(ErrorCode.CANCELLED, "this scheduler is about to end", retry=True),
        )

    def _begin(self, worker: str, command: Command, footprint_bytes: int, reason: str) -> _Pending:
        model = command.spec.model_name
        pending = _Pending(command, worker, reason, footprint_bytes, monotonic())
        self._pending[worker, model] = pending
        self._recent.append(pending)
        log.info("%s: %s", command.kind, reason, extra=about(model=model, worker=worker))
        pending.task = self._tasks.create_task(self._follow(pending), name=f"{command.kind} {model}")
        return pending

    def report(self, report: LoadReport, now: float) -> bool:
        """Compare a worker's report with what was asked of it. Whether a command ended by that."""
        models = {model.model: model for model in report.models}
        changed = False
        for (worker, model), pending in list(self._pending.items()):
            if worker != report.worker:
                continue
            load = models.get(model) or ModelLoad(model, ModelState.COLD)
            if pending.outcome is not None:
                # The report that was on its way when the answer came still tells of the state before.
                if load.state is pending.outcome.state or now - pending.ended_at >= REPORT_GRACE_S:
                    del self._pending[worker, model]
                    changed = True
            elif (outcome := pending.reported(load, report.commanded, now)) is not None:
                self._end(pending, outcome, unanswered=outcome.error is not None)
                pending.stop_following()
                changed = True
        return changed

    def worker_lost(self, worker: str) -> None:
        """Give up what was asked of a worker that is gone."""
        for key, pending in list(self._pending.items()):
            if key[0] == worker:
                del self._pending[key]
                if pending.outcome is None:
                    pending.outcome = CommandOutcome(worker, key[1], ModelState.COLD)
                    log.info(
                        "%s given up: its worker is gone",
                        pending.command.kind,
                        extra=about(model=key[1], worker=worker),
                    )
                pending.stop_following()

    def recent(self, now: float) -> list[ExplainedAction]:
        """The latest commands, newest last."""
        return [
            ExplainedAction(
                pending.command.kind,
                pending.command.spec.model_name,
                pending.worker,
                pending.reason,
                round(now - pending.sent_at, 3),
                _told(pending.outcome) if pending.outcome else "",
            )
            for pending in self._recent
        ]

    def close(self) -> None:
        """Follow no command any longer; what was sent goes on at the workers."""
        for pending in self._pending.values():
            pending.stop_following()

    async def _follow(self, pending: _Pending) -> None:
        command, model = pending.command, pending.command.spec.model_name
        timeout_s = command.deadline_s + command.drain_s + ANSWER_SLACK_S
        unanswered = True
        try:
            outcome = await self._bus.request(
                subjects.command(pending.worker), command, CommandOutcome, timeout_s=timeout_s
            )
            unanswered = False
        except PrismError as error:
            outcome = CommandOutcome(pending.worker, model, ModelState.FAILED, error.body)
        except (nats.errors.Error, OSError) as error:
            body = ErrorBody(ErrorCode.INTERNAL, f"not sent: {error or type(error).__name__}", retry=True)
            outcome = CommandOutcome(pending.worker, model, ModelState.FAILED, body)
        if pending.outcome is None:
            self._end(pending, outcome, unanswered=unanswered)

    def _end(self, pending: _Pending, outcome: CommandOutcome, *, unanswered: bool = False) -> None:
        # What a worker answers, a failure too, the worker has told.
        pending.outcome = outcome
        pending.ended_at = monotonic()
        took = pending.ended_at - pending.sent_at
        log.log(
            logging.WARNING if unanswered else logging.INFO,
            "%s: %s after %.2f s",
            pending.command.kind,
            _told(outcome),
            took,
            extra=about(model=pending.command.spec.model_name, worker=pending.worker),
        )
        self._on_outcome(pending.command, outcome)


def _told(outcome: CommandOutcome) -> str:
    if outcome.error is not None:
        return f"{outcome.error.code}: {outcome.error.message}"
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in outcome.seconds.items())
    return f"{outcome.state} ({phases})" if phases else str(outcome.state)
