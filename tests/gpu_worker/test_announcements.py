"""What a worker tells of commands that are done: simulated engines, each a real process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.msg import Msg
from tests.gpu_worker.worker_rig import DEADLINE_S, SMALL, Rig, device_rig

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.errors import ErrorBody, ErrorCode
from prism.common.messages.codec import decode
from prism.common.messages.events import Event
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind
from prism.gpu_worker.devices.simulated import simulated_device
from prism.gpu_worker.devices.simulated_costs import SimulatedCosts
from prism.gpu_worker.engine_protocol import Imaged


@pytest.fixture
async def rig(
    session_nats: NatsServer, module_store: Path, tiny_models: dict[str, Path]
) -> AsyncIterator[Rig]:
    costs = SimulatedCosts(start_ms=0, doze_ms=0, wake_ms=0, freeze_ms=0, thaw_ms=0)
    async with (
        simulated_device(costs) as device,
        device_rig(session_nats, module_store, device, tiny_models) as ready,
    ):
        yield ready


@pytest.fixture
async def done(rig: Rig) -> AsyncIterator["asyncio.Queue[Event]"]:
    """Events of commands that are done, as they come: the ones that say how long it took."""
    told: asyncio.Queue[Event] = asyncio.Queue()

    async def on_event(message: Msg) -> None:
        event = decode(message.data, Event)
        if event.source == rig.id and event.seconds:
            told.put_nowait(event)

    subscription = await rig.bus.subscribe(subjects.events(), on_event, inline=True)
    await rig.bus.flush()
    yield told
    await subscription.unsubscribe()


async def word(rig: Rig, done: "asyncio.Queue[Event]", kind: CommandKind) -> tuple[str, str]:
    """Carry a command out; what is told of it."""
    outcome = await rig.command(kind)
    assert outcome.error is None, outcome.error
    event = await asyncio.wait_for(done.get(), DEADLINE_S)
    return event.kind, event.detail


async def test_a_command_that_is_done_is_told_by_what_the_model_is_then(
    rig: Rig, done: "asyncio.Queue[Event]"
) -> None:
    assert await word(rig, done, CommandKind.ACTIVATE) == ("activated", "from cold")
    assert await word(rig, done, CommandKind.DOZE) == ("dozed", "from active")
    assert await word(rig, done, CommandKind.FREEZE) == ("froze", "from dozing")
    assert await word(rig, done, CommandKind.DOZE) == ("dozed", "from frozen")
    assert await word(rig, done, CommandKind.ACTIVATE) == ("activated", "from dozing")
    assert await word(rig, done, CommandKind.FREEZE) == ("froze", "from active")
    assert await word(rig, done, CommandKind.RELEASE) == ("released", "from frozen")


@pytest.mark.parametrize("kind", [CommandKind.DOZE, CommandKind.FREEZE])
async def test_a_model_that_was_to_sleep_and_has_no_image_is_told_as_released(
    rig: Rig, done: "asyncio.Queue[Event]", kind: CommandKind
) -> None:
    await word(rig, done, CommandKind.ACTIVATE)
    image = rig.worker.instances[SMALL].image
    image.told(Imaged(0.0, ErrorBody(ErrorCode.STORE_UNAVAILABLE, "the disk is full")))
    assert await word(rig, done, kind) == ("released", "from active")
    assert rig.load().state is ModelState.COLD
