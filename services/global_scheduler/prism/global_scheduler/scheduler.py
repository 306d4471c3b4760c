"""The shell around a placement policy: reports in, commands out, while leading."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from time import monotonic

import msgspec
from nats.aio.msg import Msg

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.demand_parts import DemandParts
from prism.common.errors import ErrorCode
from prism.common.garbage import garbage_collected_later
from prism.common.messages.codec import decode
from prism.common.messages.events import Event
from prism.common.messages.explain import (
    ExplainedDemand,
    ExplainedNote,
    ExplainedWorker,
    ModelExplanation,
    PlanReport,
)
from prism.common.messages.load import DemandReport, LoadReport
from prism.common.messages.models import ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome, Route
from prism.common.mirror import BucketMirror
from prism.common.telemetry import about
from prism.global_scheduler.cluster import WORKER_SILENT_S, ClusterState
from prism.global_scheduler.commands import CommandRunner
from prism.global_scheduler.election import Election
from prism.global_scheduler.obstacles import Outlook
from prism.global_scheduler.routes import DeadRoutes
from prism.scheduling.cost import GpuProfile
from prism.scheduling.placement import PlacementPolicy
from prism.scheduling.placement.actions import Action, Activate, Doze, Freeze, Note, Plan, Release
from prism.scheduling.placement.board import Board
from prism.scheduling.placement.explanation import explain
from prism.scheduling.placement.snapshot import ClusterSnapshot

log = logging.getLogger(__name__)

SETTLE_S = 0.5
TICK_S = 1.0
BALANCE_S = 5.0
HELD_UP_S = 1.0
"""A look that comes later than that after it was due tells of this process, not of others' silence."""
MOST_EXPLAINED = 200


class Deadlines(msgspec.Struct, frozen=True):
    """How long the transitions of a model may take, in seconds; a drain comes on top. `drain_s` is that of an
    engine whose model has changed."""

    activate_s: float = 180.0
    doze_s: float = 30.0
    release_s: float = 30.0
    drain_s: float = 60.0


class GlobalScheduler:
    """Plans on every event that matters and once a second, and commands what the plan says. Every BALANCE_S
    the plan also looks at balance.

    Only the leader does, from SETTLE_S after it came to lead: by then every worker has reported.
    """

    def __init__(
        self,
        bus: Bus,
        tasks: asyncio.TaskGroup,
        policy: PlacementPolicy,
        name: str,
        deadlines: Deadlines,
        profiles: Mapping[str, GpuProfile] | None = None,
    ) -> None:
        self.cluster = ClusterState(profiles)
        self._bus = bus
        self._tasks = tasks
        self._policy = policy
        self._outlook = Outlook(policy)
        self.policy_name = name
        self._deadlines = deadlines
        self._commands = CommandRunner(bus, tasks, self._on_outcome)
        self._election: Election | None = None
        self._demand_parts = DemandParts()
        self._wake = asyncio.Event()
        self._settled_at = 0.0
        self._notes: tuple[Note, ...] = ()
        self._balanced_at = 0.0
        self._looked_at = monotonic()
        self._held_up = False
        self._moves: dict[tuple[str, str], str] = {}

    def on_spec(self, key: str, spec: ModelSpec | None) -> None:
        """A model was registered, changed or removed."""
        self.cluster.set_spec(key, spec)
        self._wake.set()

    def on_facts(self, key: str, facts: ModelFacts | None) -> None:
        """A model store has read a model's folder."""
        self.cluster.set_facts(key, facts)
        self._wake.set()

    async def on_load(self, message: Msg) -> None:
        """A worker reports."""
        report, now = decode(message.data, LoadReport), monotonic()
        ended = self._commands.report(report, now)
        # While something waits, even an unchanged report may mean that its patience is over.
        if self.cluster.load(report, now) or ended or self._notes:
            self._wake.set()

    async def on_demand(self, message: Msg) -> None:
        """A gateway reports."""
        report = self._demand_parts.take(decode(message.data, DemandReport))
        if report is not None:
            self.cluster.demand(report, monotonic())
            self._wake.set()

    def on_leadership(self, epoch: int) -> None:
        """This instance came to lead in `epoch`, or, with 0, leads no more."""
        if epoch and self._election is not None:
            self._settled_at = monotonic() + SETTLE_S
            asyncio.get_running_loop().call_later(SETTLE_S, self._wake.set)
            event = Event("leader", "", self._election.instance, detail=f"epoch {epoch}")
            self._tasks.create_task(self._bus.tell(event))
        else:
            self._notes = ()

    async def run(self, election: Election, routes: BucketMirror[Route]) -> None:
        """Plan until cancelled."""
        self._election = election
        dead_routes = DeadRoutes(self._bus, routes)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._step(election, dead_routes)
            except Exception:
                # One snapshot that a policy chokes on must not end the placement of all models.
                log.exception("planning failed; trying again in %.0f s", TICK_S)
                await asyncio.sleep(TICK_S)

    async def _step(self, election: Election, dead_routes: DeadRoutes) -> None:
        now = monotonic()
        retiring = {name for name, seen in self.cluster.workers.items() if seen.report.draining}
        for worker in [] if self._is_held_up(now) else self.cluster.forget_silent(now):
            self._tell_gone(worker, election, retired=worker in retiring)
            self._commands.worker_lost(worker)
            self._moves = {key: source for key, source in self._moves.items() if key[0] != worker}
        gone = dead_routes.find(set(self.cluster.workers), now)
        if not election.leading or now < self._settled_at:
            return
        if gone:
            await dead_routes.take_down(gone)
            now = monotonic()
        balance = now - self._balanced_at >= BALANCE_S
        if balance:
            self._balanced_at = now
        self._release_outdated(election, now)
        snapshot = self.cluster.snapshot(self._commands.in_flight(), now, balance=balance)
        with garbage_collected_later():
            plan = self._policy.plan(snapshot, now)
        self._carry_out(plan, snapshot, election)

    def _release_outdated(self, election: Election, now: float) -> None:
        """Have engines of a version that is not registered any more end, after their requests. No policy is
        asked: they serve nobody new, and from here on each plan sees them as leaving."""
        held_off = {(one.worker, one.model) for one in self._commands.in_flight()}
        held_off |= {(one.worker, one.model) for one in self.cluster.backoff.failures() if one.retry_at > now}
        for worker, spec, facts in self.cluster.outdated():
            if (worker, spec.model_name) in held_off or not self._bus.client.is_connected:
                continue
            limits = self._deadlines
            command = Command(
                CommandKind.RELEASE, election.epoch, spec, facts, limits.release_s, drain_s=limits.drain_s
            )
            reason = "its files have changed since its engine was started"
            self._commands.start(worker, command, footprint_bytes=0, reason=reason)

    def _is_held_up(self, now: float) -> bool:
        """Whether what others said meanwhile is to be read first. Not twice running: then it is known."""
        late = now - self._looked_at > TICK_S + HELD_UP_S
        self._looked_at = now
        self._held_up = late and not self._held_up
        return self._held_up

    def _tell_move(self, kind: str, worker: str, model: str, detail: str) -> None:
        instance = self._election.instance if self._election else ""
        self._tasks.create_task(self._bus.tell(Event(kind, model, instance, worker, detail)))

    def _tell_gone(self, worker: str, election: Election, *, retired: bool) -> None:
        if not election.leading:
            return
        if retired:
            log.info("worker has retired", extra=about(worker=worker))
            return
        log.warning(
            "nothing heard of a worker for %.1f s: it counts as gone, its requests go on elsewhere; "
            "see its own log",
            WORKER_SILENT_S,
            extra=about(worker=worker),
        )
        event = Event("lost", "", election.instance, worker, "no load report")
        self._tasks.create_task(self._bus.tell(event))

    async def forgive(self, spec: ModelSpec, facts: ModelFacts) -> list[CommandOutcome]:
        """Forget that a model failed, here and on the workers: what those that had it failed answer."""
        self.cluster.set_facts(subjects.facts_key(spec.model_name), facts)
        workers = [
            worker
            for worker in self.cluster.forgive(spec.model_name)
            if not self._commands.awaits(worker, spec.model_name)
        ]
        self._wake.set()
        epoch = self._election.epoch if self._election else 0
        command = Command(CommandKind.RELEASE, epoch, spec, facts, self._deadlines.release_s)
        return await asyncio.gather(
            *(self._commands.carry_out(worker, command, reason="to be tried again") for worker in workers)
        )

    def close(self) -> None:
        """Follow no command any longer."""
        self._commands.close()

    def explain(self) -> PlanReport:
        """What is known and was decided, for people."""
        now = monotonic()
        snapshot = self.cluster.snapshot(self._commands.in_flight(), now)
        election = self._election
        return PlanReport(
            instance=election.instance if election else "",
            leader=election.leader if election else "",
            epoch=election.epoch if election else 0,
            policy=self.policy_name,
            models=len(snapshot.models),
            actions=self._commands.recent(now),
            notes=[ExplainedNote(note.model, note.text) for note in self._notes],
            workers=[
                ExplainedWorker(
                    worker.id,
                    worker.node,
                    list(worker.gpu_ids),
                    worker.limit_bytes,
                    worker.reserved_bytes,
                    {name: model.state for name, model in worker.models.items()},
                    worker.draining,
                )
                for worker in snapshot.workers
            ],
            demand=[
                ExplainedDemand(name, demand.parked, round(demand.oldest_parked_s, 3))
                for name, demand in sorted(snapshot.demand.items())
            ],
        )

    def explain_models(self, model: str = "") -> list[ModelExplanation]:
        """Why `model` is where it is; all models in brief for an empty name. Empty for an unknown one."""
        now = monotonic()
        snapshot = self.cluster.snapshot(self._commands.in_flight(), now)
        names = [model] if model else list(snapshot.models)[:MOST_EXPLAINED]
        board = None if model else Board(snapshot, now)
        found = [explain(self._policy, snapshot, now, name, board) for name in names]
        recent = self._commands.recent(now)
        return [
            msgspec.structs.replace(
                one, decided=[action for action in recent if model and action.model == one.model]
            )
            for one in found
            if one is not None
        ]

    def obstacles(self) -> list[ExplainedNote]:
        """What stands in the way of models that no request would wake. Nothing while not leading, or before
        every worker has reported."""
        now = monotonic()
        if self._election is None or not self._election.leading or now < self._settled_at:
            return []
        return self._outlook.look(lambda: self.cluster.snapshot(self._commands.in_flight(), now))

    def _carry_out(self, plan: Plan, snapshot: ClusterSnapshot, election: Election) -> None:
        for note in plan.notes:
            if note not in self._notes:
                level = logging.INFO if note.passing else logging.WARNING
                log.log(level, "%s", note.text, extra=about(model=note.model))
        self._notes = plan.notes
        for action in plan.actions:
            if not (election.leading and self._bus.client.is_connected):
                return
            view = snapshot.models[action.model]
            if view.facts is None:
                continue
            if isinstance(action, Activate) and action.moves_from:
                self._moves[action.worker, action.model] = action.moves_from
                self._tell_move("moving", action.worker, action.model, f"from {action.moves_from}")
            self._commands.start(
                action.worker,
                self._command(action, election.epoch, view.spec, view.facts),
                footprint_bytes=action.footprint_bytes if isinstance(action, Activate) else 0,
                reason=action.reason,
            )

    def _command(self, action: Action, epoch: int, spec: ModelSpec, facts: ModelFacts) -> Command:
        limits = self._deadlines
        match action:
            case Activate():
                kind, deadline_s = CommandKind.ACTIVATE, limits.activate_s
                gpu_ids = list(action.gpu_ids)
                return Command(
                    kind, epoch, spec, facts, deadline_s, kv_bytes=action.kv_bytes, gpu_ids=gpu_ids
                )
            case Doze():
                return Command(CommandKind.DOZE, epoch, spec, facts, limits.doze_s, drain_s=action.drain_s)
            case Freeze():
                return Command(CommandKind.FREEZE, epoch, spec, facts, limits.doze_s)
            case Release():
                return Command(CommandKind.RELEASE, epoch, spec, facts, limits.release_s)

    def _on_outcome(self, command: Command, outcome: CommandOutcome) -> None:
        self._wake.set()
        error, election = outcome.error, self._election
        source = self._moves.pop((outcome.worker, outcome.model), None)
        if source is not None and error is None and outcome.state is ModelState.ACTIVE:
            self._tell_move("moved", outcome.worker, outcome.model, f"from {source}")
        if error is None or election is None:
            return
        if error.code is ErrorCode.STALE_EPOCH:
            # Says nothing about the model, all about this instance.
            election.renounce(command.epoch, error.message)
            return
        self.cluster.backoff.failed(outcome.worker, outcome.model, error.message, monotonic())
        if outcome.state is ModelState.FAILED or command.kind is CommandKind.ACTIVATE:
            event = Event("failed", outcome.model, election.instance, outcome.worker, error.message)
            self._tasks.create_task(self._bus.tell(event))
