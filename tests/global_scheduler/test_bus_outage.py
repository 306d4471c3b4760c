"""Commands under way while the bus is away for a moment: too short for anybody to count as gone."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from prism.cli.nats_server import NatsServer, nats_server
from prism.common.bus import Bus
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind

if TYPE_CHECKING:
    from tests.global_scheduler.conftest import Register, SchedulerFactory, ScriptedGateway, WorkerFactory

pytestmark = pytest.mark.core


async def test_a_failure_told_before_the_scheduler_is_back_on_the_bus_holds_nobody_up(
    scheduler: "SchedulerFactory",
    scripted_worker: "WorkerFactory",
    gateway: "ScriptedGateway",
    register_model: "Register",
    bus: Bus,
    fresh_nats: NatsServer,
    tmp_path: Path,
) -> None:
    port = urlsplit(fresh_nats.url).port
    assert port is not None
    await register_model("a", 60)
    async with scripted_worker() as worker, scheduler() as running:
        # The worker comes back first, so that its answer finds nobody.
        bus.client.options["reconnect_time_wait"] = 0.05
        running._bus.client.options["reconnect_time_wait"] = 0.9
        worker.go_on.clear()
        worker.fail_next["a"] = "the engine said no"
        await gateway.park("a")
        await worker.until(lambda: worker.states.get("a") is ModelState.STARTING)
        fresh_nats.stop()
        worker.go_on.set()
        await worker.until(lambda: worker.states["a"] is ModelState.FAILED)
        with nats_server(tmp_path / "nats", port=port):
            await worker.until(lambda: worker.states["a"] is ModelState.ACTIVE)
            assert worker.kinds() == [(CommandKind.ACTIVATE, "a")] * 2
