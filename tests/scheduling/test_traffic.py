"""Rates of the last minute, also of models that have been asked for for less than that."""

import math

import pytest

from prism.scheduling.traffic import WINDOW_S, Traffic, TrafficWindow

pytestmark = pytest.mark.core


def asked(window: TrafficWindow, since: float, until: float, rate: float) -> None:
    for number in range(int((until - since) * rate)):
        window.arrived(since + (number + 1) / rate, 100)


def test_a_steady_rate_is_told_as_it_is() -> None:
    window = TrafficWindow()
    asked(window, 0.0, 10 * WINDOW_S, 2.0)
    traffic = window.at(10 * WINDOW_S)
    assert traffic.arrivals_per_s == pytest.approx(2.0, rel=0.02)
    assert traffic.prompt_tokens_per_s == pytest.approx(200.0, rel=0.02)
    assert traffic.gap_s == pytest.approx(0.5)


def test_the_rate_of_a_new_model_is_over_the_time_since_its_first_request() -> None:
    window = TrafficWindow()
    asked(window, 0.0, 12.0, 2.0)
    assert window.at(12.0).arrivals_per_s == pytest.approx(2.0, rel=0.15)


def test_a_single_request_is_no_rush() -> None:
    window = TrafficWindow()
    window.arrived(5.0, 100)
    assert window.at(5.0).arrivals_per_s <= 1.1 / TrafficWindow.SHORTEST_S


def test_it_fades() -> None:
    window = TrafficWindow()
    asked(window, 0.0, WINDOW_S, 2.0)
    before = window.at(WINDOW_S).arrivals_per_s
    assert window.at(3 * WINDOW_S).arrivals_per_s < 0.2 * before


def test_nothing_is_known_of_a_model_that_nobody_asked_for() -> None:
    assert TrafficWindow().at(7.0) == Traffic(last_arrival_s=math.inf)
