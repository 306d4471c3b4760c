"""Commands whose answer does not come, told apart by load reports: still carried out, done, or lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import pytest

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.load import LoadReport, ModelLoad
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.global_scheduler.commands import LOST_AFTER_S, REPORT_GRACE_S, CommandRunner

pytestmark = pytest.mark.core

WORKER, MODEL = "worker-1", "a"
DEADLINE_S = 180.0
REPORTS_EVERY_S = 0.25
ACTIVATE, DOZE, FREEZE, RELEASE = (
    CommandKind.ACTIVATE,
    CommandKind.DOZE,
    CommandKind.FREEZE,
    CommandKind.RELEASE,
)


class Asked:
    """A command that a worker was given and never answers; its reports come when the test says."""

    def __init__(self, runner: CommandRunner, outcomes: list[CommandOutcome]) -> None:
        self.outcomes = outcomes
        self.now = monotonic()
        self._runner = runner

    def report(
        self,
        state: ModelState,
        seconds: float,
        *,
        commanded: list[str] | None,
        failure: str | None = None,
    ) -> None:
        """Reports that say so for `seconds`, from the next one on."""
        models = [] if state is ModelState.COLD else [ModelLoad(MODEL, state, failure=failure)]
        told = LoadReport(WORKER, "node", "simulated", [0], 100, 0, models, commanded=commanded)
        until = self.now + seconds
        while self.now < until:
            self.now += REPORTS_EVERY_S
            self._runner.report(told, self.now)

    @property
    def in_flight(self) -> bool:
        """Whether the command counts as under way."""
        return self._runner.awaits(WORKER, MODEL)


@asynccontextmanager
async def asked(bus: Bus, kind: CommandKind) -> AsyncIterator[Asked]:
    """A command of this kind has reached somebody who says nothing."""
    arrived = asyncio.Event()
    outcomes: list[CommandOutcome] = []

    async def say_nothing(_message: object) -> None:
        arrived.set()

    await bus.subscribe(subjects.command(WORKER), say_nothing)
    await bus.flush()
    async with asyncio.TaskGroup() as tasks:
        runner = CommandRunner(bus, tasks, lambda _command, outcome: outcomes.append(outcome))
        spec, facts = ModelSpec(MODEL, "/a"), ModelFacts(MODEL)
        runner.start(WORKER, Command(kind, 1, spec, facts, DEADLINE_S), footprint_bytes=0, reason="test")
        await asyncio.wait_for(arrived.wait(), 10)
        yield Asked(runner, outcomes)
        runner.close()


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (ACTIVATE, ModelState.COLD),
        (ACTIVATE, ModelState.DOZING),
        (DOZE, ModelState.ACTIVE),
        (FREEZE, ModelState.DOZING),
        (RELEASE, ModelState.DOZING),
    ],
)
async def test_one_that_its_worker_knows_nothing_of_has_failed(
    bus: Bus, kind: CommandKind, state: ModelState
) -> None:
    async with asked(bus, kind) as command:
        command.report(state, LOST_AFTER_S - REPORTS_EVERY_S, commanded=["another"])
        assert command.in_flight
        command.report(state, 2 * REPORTS_EVERY_S, commanded=["another"])
        assert not command.in_flight
        (outcome,) = command.outcomes
        assert outcome.state is state
        assert outcome.error is not None
        assert outcome.error.retry


async def test_a_failure_whose_answer_was_lost_is_told_with_its_reason(bus: Bus) -> None:
    async with asked(bus, ACTIVATE) as command:
        command.report(ModelState.STARTING, 1.0, commanded=[MODEL])
        command.report(ModelState.FAILED, LOST_AFTER_S + 1.0, commanded=[], failure="the engine said no")
        (outcome,) = command.outcomes
        assert outcome.state is ModelState.FAILED
        assert outcome.error is not None
        assert "the engine said no" in outcome.error.message


@pytest.mark.parametrize("kind", [ACTIVATE, RELEASE])
async def test_what_a_model_failed_of_before_is_not_what_a_lost_command_came_to(
    bus: Bus, kind: CommandKind
) -> None:
    async with asked(bus, kind) as command:
        command.report(ModelState.FAILED, LOST_AFTER_S + 1.0, commanded=[], failure="the engine said no")
        (outcome,) = command.outcomes
        assert outcome.error is not None
        assert "the bus lost" in outcome.error.message
        assert "the engine said no" not in outcome.error.message


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (ACTIVATE, ModelState.COLD),  # Held behind another command, or room is made for it.
        (ACTIVATE, ModelState.DOZING),
        (ACTIVATE, ModelState.FAILED),
        (ACTIVATE, ModelState.STARTING),
        (DOZE, ModelState.ACTIVE),  # Its image is still exported.
        (FREEZE, ModelState.DOZING),
        (RELEASE, ModelState.DOZING),
    ],
)
async def test_one_that_its_worker_still_has_is_waited_for_however_long(
    bus: Bus, kind: CommandKind, state: ModelState
) -> None:
    async with asked(bus, kind) as command:
        # This report was on its way when the command was sent.
        command.report(state, REPORTS_EVERY_S, commanded=[])
        command.report(state, DEADLINE_S, commanded=[MODEL])
        assert command.in_flight
        assert not command.outcomes


async def test_of_a_worker_that_does_not_tell_what_it_carries_out_nothing_is_concluded(bus: Bus) -> None:
    async with asked(bus, ACTIVATE) as command:
        command.report(ModelState.COLD, DEADLINE_S, commanded=None)
        assert command.in_flight


async def test_time_in_which_no_report_came_does_not_count(bus: Bus) -> None:
    async with asked(bus, ACTIVATE) as command:
        command.report(ModelState.COLD, REPORTS_EVERY_S, commanded=[])
        # The bus was away, or this scheduler was stopped: what comes first may be old.
        command.now += 10.0
        command.report(ModelState.COLD, REPORTS_EVERY_S, commanded=[])
        assert command.in_flight
        command.report(ModelState.COLD, LOST_AFTER_S, commanded=[])
        assert not command.in_flight


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (ACTIVATE, ModelState.ACTIVE),
        (DOZE, ModelState.DOZING),
        (DOZE, ModelState.COLD),  # There was no image to wake from.
        (FREEZE, ModelState.FROZEN),
        (FREEZE, ModelState.COLD),
        (RELEASE, ModelState.COLD),
    ],
)
async def test_a_model_that_shows_where_it_was_to_be_has_got_there(
    bus: Bus, kind: CommandKind, state: ModelState
) -> None:
    async with asked(bus, kind) as command:
        command.report(state, REPORT_GRACE_S + 2 * REPORTS_EVERY_S, commanded=[])
        assert command.outcomes == [CommandOutcome(WORKER, MODEL, state)]
