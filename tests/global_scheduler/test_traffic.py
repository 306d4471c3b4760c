"""Rates from counters: what came between two reports, whoever is new and whoever starts anew."""

import math

import pytest

from prism.common.messages.load import DemandReport, LoadReport, ModelDemand, ModelLoad
from prism.common.messages.models import ModelState
from prism.global_scheduler.traffic import TrafficWatch
from prism.scheduling.traffic import WINDOW_S, Traffic, TrafficWindow

pytestmark = pytest.mark.core

FILLED_S = WINDOW_S * (1 - math.exp(-TrafficWindow.SHORTEST_S / WINDOW_S))
"""What a rate is taken over when a model was first asked for just now."""


def demand(requests: int, tokens: int = 0, gateway: str = "g") -> DemandReport:
    return DemandReport(gateway, [ModelDemand("m", requests=requests, prompt_tokens=tokens)])


def load(tokens: int, worker: str = "w") -> LoadReport:
    models = [ModelLoad("m", ModelState.ACTIVE, generated_tokens=tokens)]
    return LoadReport(worker, "n", "cpu", [0], 1, 0, models)


def test_the_first_report_is_where_counting_begins() -> None:
    watch = TrafficWatch()
    watch.demand(demand(1000, 9000), 10.0)
    assert watch.at("m", 10.0) == Traffic()
    watch.demand(demand(1006, 9600), 11.0)
    traffic = watch.at("m", 11.0)
    assert traffic.arrivals_per_s == pytest.approx(6 / FILLED_S, rel=0.01)
    assert traffic.prompt_tokens_per_s == pytest.approx(600 / FILLED_S, rel=0.01)


def test_what_came_between_two_reports_came_evenly() -> None:
    watch = TrafficWatch()
    watch.demand(demand(0), 0.0)
    watch.demand(demand(4), 2.0)
    traffic = watch.at("m", 5.0)
    assert traffic.gap_s == pytest.approx(0.5)
    assert traffic.last_arrival_s == 3.0


def test_a_model_that_a_known_gateway_names_for_the_first_time_counts_in_full() -> None:
    watch = TrafficWatch()
    watch.demand(DemandReport("g"), 0.0)
    watch.demand(demand(3), 1.0)
    assert watch.at("m", 1.0).arrivals_per_s == pytest.approx(3 / FILLED_S, rel=0.02)


def test_a_gateway_that_left_a_model_out_for_a_while_goes_on_counting() -> None:
    watch = TrafficWatch()
    watch.demand(demand(50), 0.0)
    watch.demand(DemandReport("g"), 1.0)
    watch.demand(demand(51), 2.0)
    assert watch.at("m", 2.0).arrivals_per_s == pytest.approx(1 / FILLED_S)


def test_a_counter_that_shrank_is_a_new_reporters() -> None:
    watch = TrafficWatch()
    watch.demand(demand(50), 0.0)
    watch.demand(demand(2), 1.0)
    assert watch.at("m", 1.0).arrivals_per_s == pytest.approx(2 / FILLED_S, rel=0.02)
    watch.load(load(500), 1.0)
    watch.load(load(30), 1.0)
    assert watch.at("m", 1.0).output_tokens_per_s == pytest.approx(30 / FILLED_S)


def test_gateways_and_workers_add_up_and_are_forgotten() -> None:
    watch = TrafficWatch()
    for gateway in ("g", "h"):
        watch.demand(demand(0, gateway=gateway), 0.0)
        watch.demand(demand(6, gateway=gateway), 0.0)
    for worker in ("v", "w"):
        watch.load(load(0, worker), 0.0)
        watch.load(load(60, worker), 0.0)
    traffic = watch.at("m", 0.0)
    assert traffic.arrivals_per_s == pytest.approx(12 / FILLED_S)
    assert traffic.output_tokens_per_s == pytest.approx(120 / FILLED_S)
    watch.forget_gateway("g")
    watch.forget_worker("w")
    watch.demand(demand(100), 0.0)
    watch.load(load(100), 0.0)
    assert watch.at("m", 0.0) == traffic, "who comes back begins anew"


def test_a_flood_costs_no_more_than_so_many_steps_but_is_counted() -> None:
    watch = TrafficWatch()
    watch.demand(demand(0), 0.0)
    watch.demand(demand(100_000, 1_000_000), 1.0)
    traffic = watch.at("m", 1.0)
    assert traffic.arrivals_per_s == pytest.approx(100_000 / FILLED_S, rel=0.02)
    assert traffic.prompt_tokens_per_s == pytest.approx(1_000_000 / FILLED_S, rel=0.02)
