"""What the scheduler is told, and how often."""

import pytest

from prism.common.messages.load import DemandReport, ModelDemand
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
