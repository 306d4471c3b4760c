"""What the scheduler is told, and how often."""

import asyncio
import logging
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from prism.cli.nats_server import nats_server
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.demand_parts import DemandParts
from prism.common.messages.codec import decode
from prism.common.messages.load import DemandReport, ModelDemand
from prism.common.tasks import end_task
from prism.gateway import demand as reporting
from prism.gateway.demand import ArrivalRate, Demand, materially_changed
from prism.gateway.parking import Parking

pytestmark = pytest.mark.core


def test_rate_nears_the_true_one_and_fades() -> None:
    rate = ArrivalRate(window_s=10)
    for tick in range(1000):
        rate.add(tick / 10)
    assert rate.at(100) == pytest.approx(10, rel=0.05)
    assert rate.at(110) == pytest.approx(rate.at(100) / 2.718, rel=0.01)
    assert rate.at(300) < 0.001


@pytest.mark.parametrize(
    ("reported", "parked", "expected"),
    [
        (0, 1, True),
        (1, 0, True),
        (1, 5, False),
        (1, 10, True),
        (100, 150, False),
        (100, 40, True),
        (0, 0, False),
    ],
)
def test_first_last_and_doubling_are_material(reported: int, parked: int, expected: bool) -> None:
    assert materially_changed(reported, parked) is expected


def test_burst_of_200_is_worth_few_reports() -> None:
    reports, reported = 0, 0
    for parked in range(1, 201):
        if materially_changed(reported, parked):
            reports, reported = reports + 1, parked
    assert reports <= 6


def test_report_holds_models_in_demand_and_leaves_out_the_others() -> None:
    now = 0.0
    demand = Demand("g", lambda: now)
    parking = Parking(lambda: now, per_model=9, total=9)
    demand.arrived("quiet", 7)
    with parking.place("parked"):
        now = 2.0
        first = demand.report(parking)
    assert first.models[0] == ModelDemand("parked", parked=1, oldest_parked_s=2.0)
    assert first.models[1].model == "quiet"
    assert first.models[1].arrivals_per_s == pytest.approx(0.082, abs=0.001)
    assert (first.models[1].requests, first.models[1].prompt_tokens) == (1, 7)
    now = 100.0
    assert demand.report(parking) == DemandReport("g")


async def heard(bus: Bus) -> asyncio.Queue[DemandReport]:
    """The messages of demand on the bus from now on."""
    messages: asyncio.Queue[DemandReport] = asyncio.Queue()

    async def note(message: Msg) -> None:
        messages.put_nowait(decode(message.data, DemandReport))

    await bus.subscribe(subjects.demand("*"), note, inline=True)
    await bus.flush()
    return messages


async def test_thousands_of_models_are_told_however_little_a_message_holds(tmp_path: Path) -> None:
    names = {f"model-{number}" for number in range(2000)}
    with nats_server(tmp_path, max_payload=64 * 1024) as server:
        async with connect_bus(server.url, name="test") as bus:
            messages = await heard(bus)
            clock = asyncio.get_running_loop().time
            demand = Demand("g", clock)
            for name in names:
                demand.arrived(name, 7)
            task = asyncio.create_task(demand.run(bus, Parking(clock, per_model=9, total=9)))
            try:
                async with asyncio.timeout(10):
                    for parts in (DemandParts(), DemandParts()):
                        while (report := parts.take(await messages.get())) is None:
                            assert not task.done()
                        assert {model.model for model in report.models} == names
            finally:
                await end_task(task)


async def test_a_report_that_fails_is_told_and_the_next_one_comes(
    bus: Bus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "INTERVAL_S", reporting.SPACING_S)

    class Flooded(Parking):
        looks = 0

        def models(self) -> list[str]:
            self.looks += 1
            if self.looks == 2:
                raise RuntimeError("a puddle")
            return super().models()

    messages = await heard(bus)
    clock = asyncio.get_running_loop().time
    parking = Flooded(clock, per_model=9, total=9)
    task = asyncio.create_task(Demand("g", clock).run(bus, parking))
    try:
        async with asyncio.timeout(10):
            for _ in range(3):
                await messages.get()
    finally:
        await end_task(task)
    assert parking.looks > 3
    ((level, told),) = {(record.levelno, record.getMessage()) for record in caplog.records}
    assert level == logging.ERROR
    assert "demand not reported" in told
