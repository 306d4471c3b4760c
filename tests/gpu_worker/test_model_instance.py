"""What a model's next start knows, and what happens when its engine does not end: simulated engines, each a
real process."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg
from tests.gpu_worker.worker_rig import (
    DEADLINE_S,
    KV_BYTES,
    SMALL,
    Rig,
    device_rig,
    send,
    tokens_of,
)

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.generation import TokenFrame
from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec, ModelState
from prism.common.messages.placement import Command, CommandKind, CommandOutcome
from prism.gpu_worker import counted_memory, engine_process, image_export
from prism.gpu_worker.counted_memory import CountedMemory
from prism.gpu_worker.devices.simulated import SimulatedDevice, simulated_device
from prism.gpu_worker.devices.simulated_costs import SimulatedCosts
from prism.gpu_worker.engine_process import EngineProcess
from prism.gpu_worker.engine_protocol import Done, Ready
from prism.gpu_worker.image_export import ImageExport
from prism.gpu_worker.shells import Shell
from prism.gpu_worker.started_shells import StartedShells
from prism.scheduling.ledger import Parts
from prism.scheduling.memory import kv_reservation

FIXED_BYTES = 1_000_000


class QuietShells:
    """Shells whose end is not reported before `tell` is set."""

    ready = True

    def __init__(self, inner: StartedShells) -> None:
        self._inner = inner
        self.tell = asyncio.Event()
        self.tell.set()
        self._telling: set[asyncio.Task[None]] = set()

    async def take(self, inherited: Sequence[int] = ()) -> Shell:
        """One of the inner ones."""
        shell = await self._inner.take(inherited)
        quiet = Shell(shell.pid, shell.connection)
        task = asyncio.create_task(self._report(shell, quiet))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return quiet

    async def _report(self, shell: Shell, quiet: Shell) -> None:
        how = await shell.exited
        await self.tell.wait()
        quiet.ended(how)


@pytest.fixture
async def device() -> AsyncIterator[SimulatedDevice]:
    costs = SimulatedCosts(start_ms=0, doze_ms=0, wake_ms=0, decode_step_ms=1, context_bytes=FIXED_BYTES)
    async with simulated_device(costs) as simulated:
        assert isinstance(simulated.shells, StartedShells)
        simulated.shells = QuietShells(simulated.shells)
        yield simulated


@pytest.fixture
async def rig(
    session_nats: NatsServer, module_store: Path, device: SimulatedDevice, tiny_models: dict[str, Path]
) -> AsyncIterator[Rig]:
    async with device_rig(session_nats, module_store, device, tiny_models) as ready:
        yield ready


async def activated(
    rig: Rig, spec: ModelSpec, facts: ModelFacts, deadline_s: float = DEADLINE_S
) -> CommandOutcome:
    """What comes of an activation with this spec and these facts."""
    command = Command(
        kind=CommandKind.ACTIVATE,
        epoch=1,
        spec=spec,
        facts=facts,
        deadline_s=deadline_s,
        drain_s=1.0,
        kv_bytes=KV_BYTES,
    )
    return await rig.bus.request(subjects.command(rig.id), command, CommandOutcome, timeout_s=DEADLINE_S)


def spec_of(rig: Rig, pool_gb: float | None = None) -> ModelSpec:
    placements = [InitialPlacement([0], True, pool_gb)] if pool_gb is not None else []
    return ModelSpec(SMALL, str(rig.models[SMALL]), init_placements=placements)


async def test_a_model_that_was_mended_is_started_by_what_it_is_now(rig: Rig) -> None:
    facts = rig.facts(SMALL)
    far_too_large = msgspec.structs.replace(
        facts, parameters=70_000_000_000, checkpoint_bytes=140_000_000_000
    )
    refused = await activated(rig, spec_of(rig), far_too_large)
    assert refused.error is not None
    assert refused.error.code is ErrorCode.OUT_OF_MEMORY
    outcome = await activated(rig, spec_of(rig), facts)
    assert outcome.error is None, outcome.error
    assert outcome.state is ModelState.ACTIVE


async def test_a_start_that_takes_too_long_says_how_far_it_came_and_what_gives_it_longer(rig: Rig) -> None:
    late = await activated(rig, spec_of(rig), rig.facts(SMALL), deadline_s=0.001)
    assert late.error is not None
    assert late.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert "staging" in late.error.message
    assert "--activate-deadline-s" in late.error.message


async def test_a_bound_on_its_kv_cache_that_was_changed_holds_from_its_next_start(rig: Rig) -> None:
    facts = msgspec.structs.replace(rig.facts(SMALL), kv_elements_per_token=1024)
    for pool_gb in (0.004, 0.008):
        spec = spec_of(rig, pool_gb)
        assert (await activated(rig, spec, facts)).error is None
        memory = rig.worker.instances[SMALL].memory
        assert memory.kv_cap_bytes == kv_reservation(spec, facts, None)
        await rig.command(CommandKind.RELEASE)


async def test_an_engine_that_does_not_end_keeps_its_memory_and_lets_no_other_start(
    rig: Rig, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "EXIT_DEADLINE_S", 0.05)
    shells = device.shells
    assert isinstance(shells, QuietShells)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    held = rig.worker.ledger.held(SMALL)
    shells.tell.clear()

    released = await rig.command(CommandKind.RELEASE)
    assert released.error is not None
    assert str(engine.pid) in released.error.message
    assert released.state is ModelState.FAILED
    assert rig.load().failure == released.error.message
    assert rig.worker.ledger.held(SMALL) == held, "nobody has said that its memory is free"
    again = await rig.command(CommandKind.ACTIVATE)
    assert again.error is not None
    assert again.error.retry
    assert rig.worker.ledger.held(SMALL) == held

    shells.tell.set()
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.error is None, outcome.error
    assert outcome.state is ModelState.ACTIVE
    assert (await (await send(rig, "a", [5, 6, 7], 4)).all())[-1].finish is not None


async def test_the_memory_of_an_engine_that_ends_late_is_free_then(
    rig: Rig, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "EXIT_DEADLINE_S", 0.05)
    shells = device.shells
    assert isinstance(shells, QuietShells)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    shells.tell.clear()
    assert (await rig.command(CommandKind.RELEASE)).error is not None
    shells.tell.set()
    assert (await rig.command(CommandKind.RELEASE)).error is None
    assert rig.load().state is ModelState.COLD
    assert rig.worker.ledger.reserved_bytes == 0


async def test_a_killed_engine_that_is_not_gone_leaves_no_model_that_seems_active(
    rig: Rig, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "EXIT_DEADLINE_S", 0.05)
    shells = device.shells
    assert isinstance(shells, QuietShells)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    shells.tell.clear()
    failed = asyncio.create_task(rig.until_state(ModelState.FAILED))
    engine.kill()
    await failed
    assert rig.worker.ledger.reserved_bytes > 0
    shells.tell.set()
    assert (await rig.command(CommandKind.ACTIVATE)).error is None


class Unsaid(ImageExport):
    """An image whose engine never says that it is there. `asked` is set once somebody waits for it."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.asked = asyncio.Event()

    async def exists(self) -> bool:
        self.asked.set()
        return await super().exists()


async def test_a_model_that_waits_for_its_image_to_doze_is_cold_as_soon_as_its_engine_is_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_export, "IMAGE_DEADLINE_S", 10 * DEADLINE_S)
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    instance = rig.worker.instances[SMALL]
    image = instance.image = Unsaid()
    dozing = asyncio.create_task(rig.command(CommandKind.DOZE, drain_s=10 * DEADLINE_S))
    async with asyncio.timeout(DEADLINE_S / 2):
        await image.asked.wait()
        assert instance.engine is not None
        instance.engine.kill()
        outcome = await dozing
    assert (outcome.state, outcome.error) == (ModelState.COLD, None)
    assert rig.worker.ledger.reserved_bytes == 0
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE


@pytest.mark.parametrize("beyond", [0, 1, 100])
async def test_a_request_that_goes_on_here_ends_by_its_length_where_memory_does(
    rig: Rig, beyond: int
) -> None:
    await activated(rig, spec_of(rig), msgspec.structs.replace(rig.facts(SMALL), context_length=100_000))
    most = rig.worker.instances[SMALL].most_kv_tokens
    assert most is not None
    ids = [5] * (most - 20 + beyond)
    frames = await (await send(rig, "moved", ids, 4000, replayed_tokens=400)).all()
    assert len(tokens_of(frames)) == max(0, 20 - beyond)
    finish = frames[-1].finish
    assert finish is not None
    assert finish.reason == "length"
    refused = await (await send(rig, "new", ids, 4000)).all()
    assert refused[-1].error is not None
    assert refused[-1].error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED


async def test_a_request_that_goes_on_here_ends_by_its_length_at_the_end_of_the_context(rig: Rig) -> None:
    await activated(rig, spec_of(rig), msgspec.structs.replace(rig.facts(SMALL), context_length=200))
    frames = await (await send(rig, "moved", [5] * 199, 50, replayed_tokens=100)).all()
    assert frames[-1].finish is not None
    assert frames[-1].finish.reason == "length"
    assert not tokens_of(frames)


async def test_a_request_that_nobody_can_read_is_answered(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

    async def on_frame(message: Msg) -> None:
        answer.set_result(message)

    rid = "f" * 32
    reply = subjects.reply("test", rid)
    await rig.bus.subscribe(reply, on_frame, inline=True)
    await rig.bus.client.publish(
        subjects.request(SMALL, rig.id),
        encode({"rid": rid, "model": SMALL, "input_ids": "none"}),
        reply=reply,
    )
    async with asyncio.timeout(DEADLINE_S):
        frame = decode((await answer).data, TokenFrame)
    assert (frame.rid, frame.seq) == (rid, 0)
    assert frame.error is not None
    assert frame.error.code is ErrorCode.BAD_MESSAGE


class Uncounted(SimulatedDevice):
    """A driver that does not tell what a process holds."""

    def resident_bytes(self, pid: int, ready: Ready) -> tuple[int, int]:
        raise PrismError(ErrorCode.INTERNAL, "the driver says nothing")


async def test_a_worker_whose_driver_does_not_count_reports_what_is_reserved(
    rig: Rig, device: SimulatedDevice
) -> None:
    device.__class__ = Uncounted
    outcome = await rig.command(CommandKind.ACTIVATE)
    assert outcome.error is None, outcome.error
    report = await rig.until_state(ModelState.ACTIVE)
    [load] = report.models
    held = rig.worker.ledger.held(SMALL)
    assert (load.weights_bytes, load.kv_used_bytes) == (held.weights, held.kv)


class LateCount(SimulatedDevice):
    """A driver that answers what is left with `answers` first: bytes, or an error."""

    answers: deque[int | PrismError]

    def left_bytes(self, pid: int, ready: Ready) -> int:
        answer = self.answers.popleft() if self.answers else super().left_bytes(pid, ready)
        if isinstance(answer, PrismError):
            raise answer
        return answer


async def refuse(engine: EngineProcess, deadline_s: float) -> Done:
    """A wake that the engine rolls back."""
    raise PrismError(ErrorCode.STORE_UNAVAILABLE, "the image could not be read", retry=True)


async def wake_refused(
    rig: Rig, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, *answers: int | PrismError
) -> CommandOutcome:
    """What comes of a wake that the engine rolled back, where the driver then answers with `answers`."""
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert (await rig.command(CommandKind.DOZE)).error is None
    device.__class__ = LateCount
    assert isinstance(device, LateCount)
    device.answers = deque(answers)
    with monkeypatch.context() as patch:
        patch.setattr(EngineProcess, "wake", refuse)
        outcome = await rig.command(CommandKind.ACTIVATE)
    assert not device.answers
    assert outcome.error is not None
    assert outcome.error.code is ErrorCode.STORE_UNAVAILABLE
    return outcome


@pytest.mark.parametrize("late", [(), (4096, 4096)], ids=["at once", "late"])
async def test_an_engine_that_rolled_its_wake_back_dozes_on_however_late_the_driver_counts(
    rig: Rig, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, late: tuple[int, ...]
) -> None:
    outcome = await wake_refused(rig, device, monkeypatch, *late)
    assert outcome.state is ModelState.DOZING
    assert rig.worker.ledger.held(SMALL) == Parts(fixed=FIXED_BYTES)
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE
    assert rig.worker.instances[SMALL].engine is engine


@pytest.mark.parametrize(
    "error",
    [PrismError(ErrorCode.INTERNAL, "the driver says nothing"), 4096],
    ids=["not counted", "not given back"],
)
async def test_an_engine_that_may_not_have_rolled_its_wake_back_is_discarded(
    rig: Rig, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, error: int | PrismError
) -> None:
    monkeypatch.setattr(counted_memory, "FREED_DEADLINE_S", 0.0)
    outcome = await wake_refused(rig, device, monkeypatch, error)
    assert outcome.state is ModelState.COLD
    assert rig.worker.instances[SMALL].engine is None
    assert rig.worker.ledger.reserved_bytes == 0
    assert (await rig.command(CommandKind.ACTIVATE)).state is ModelState.ACTIVE


async def test_a_wake_that_is_given_up_while_memory_is_counted_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = asyncio.Event()

    async def never(memory: CountedMemory) -> None:
        counting.set()
        await asyncio.Event().wait()

    async def nobody_serves() -> None:
        raise AssertionError

    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    assert (await rig.command(CommandKind.DOZE)).error is None
    monkeypatch.setattr(EngineProcess, "wake", refuse)
    monkeypatch.setattr(CountedMemory, "until_dozing", never)
    instance = rig.worker.instances[SMALL]
    async with asyncio.timeout(DEADLINE_S), instance.lock:
        waking = asyncio.create_task(instance.activate(KV_BYTES, DEADLINE_S, nobody_serves))
        await counting.wait()
        waking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waking
    assert instance.state is ModelState.COLD
    assert instance.engine is None
    assert rig.worker.ledger.reserved_bytes == 0


async def test_a_report_that_cannot_be_made_or_sent_is_not_the_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish = rig.worker.announcements._bus.publish
    failed = asyncio.Event()

    async def failing(subject: str, message: object) -> None:
        if subject == subjects.load(rig.id) and not failed.is_set():
            failed.set()
            raise PrismError(ErrorCode.INTERNAL, "it is larger than the server takes")
        await publish(subject, message)

    monkeypatch.setattr(rig.worker.announcements._bus, "publish", failing)
    async with asyncio.timeout(DEADLINE_S):
        await failed.wait()
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    await rig.until_state(ModelState.ACTIVE)
    assert "larger than the server takes" in caplog.text


async def test_what_a_failure_says_of_itself_is_cut_to_what_reports_can_carry(rig: Rig) -> None:
    await rig.command(CommandKind.ACTIVATE)
    instance = rig.worker.instances[SMALL]
    await instance.discard_engine(ModelState.FAILED, "x" * 100_000)
    assert instance.failure is not None
    assert len(instance.failure) < 5000


async def test_an_engine_whose_image_is_not_there_yet_goes_on_serving(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await rig.command(CommandKind.ACTIVATE)).error is None
    engine = rig.worker.instances[SMALL].engine
    assert engine is not None

    async def still_exporting(deadline_s: float) -> Done:
        raise PrismError(ErrorCode.STORE_UNAVAILABLE, "the image is still being exported", retry=True)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "doze", still_exporting)
        outcome = await rig.command(CommandKind.DOZE)
    assert outcome.error is not None
    assert (outcome.error.code, outcome.state) == (ErrorCode.STORE_UNAVAILABLE, ModelState.ACTIVE)
    assert len(tokens_of(await (await send(rig, "a", [5, 6, 7], 4)).all())) == 4
    assert rig.worker.instances[SMALL].engine is engine
    assert (await rig.command(CommandKind.DOZE)).state is ModelState.DOZING


async def test_a_start_that_a_draining_worker_cuts_short_is_answered_at_once(
    rig: Rig, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def never(inherited: Sequence[int] = ()) -> Shell:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    monkeypatch.setattr(device.shells, "take", never)
    start = asyncio.create_task(rig.command(CommandKind.ACTIVATE))
    await asyncio.wait_for(asked.wait(), DEADLINE_S)
    await rig.worker.retire(0.0)
    outcome = await asyncio.wait_for(start, DEADLINE_S / 2)
    assert outcome.error is not None
    assert (outcome.error.code, outcome.error.retry) == (ErrorCode.OVERLOADED, True)
