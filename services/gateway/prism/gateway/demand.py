"""Demand reports: what the scheduler must know to wake models, told at once and never once per request."""

import asyncio
import logging
import math
from collections.abc import Callable

import nats.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.demand_parts import split
from prism.common.messages.load import DemandReport, ModelDemand
from prism.gateway.parking import Parking

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
SPACING_S = 0.05
RATE_WINDOW_S = 10.0
FAINT = 0.01
"""Arrivals a second below which a model is no longer in demand: 70 s after a single request."""


class ArrivalRate:
    """Arrivals a second, each arrival fading with a time constant of `window_s` seconds."""

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._rate = 0.0
        self._at = 0.0

    def add(self, now: float) -> None:
        """One arrival at `now`."""
        self._rate = self.at(now) + 1 / self._window_s
        self._at = now

    def at(self, now: float) -> float:
        """The rate at `now`."""
        return self._rate * math.exp(-max(0.0, now - self._at) / self._window_s)


def materially_changed(reported: int, parked: int) -> bool:
    """Whether `parked` requests are worth a report before its turn, when the last one said `reported`."""
    if (reported == 0) != (parked == 0):
        return True
    return parked >= 2 * reported + 8 or 2 * parked + 8 <= reported


class Demand:
    """Watches arrivals and parked requests; `run` tells the scheduler."""

    def __init__(self, gateway: str, clock: Callable[[], float]) -> None:
        self._gateway = gateway
        self._clock = clock
        self._rates: dict[str, ArrivalRate] = {}
        self._reported: dict[str, int] = {}
        self._came: dict[str, tuple[int, int]] = {}
        self._due = asyncio.Event()

    def arrived(self, model: str, prompt_tokens: int) -> None:
        """A request for `model` came in."""
        self._rates.setdefault(model, ArrivalRate()).add(self._clock())
        requests, tokens = self._came.get(model, (0, 0))
        self._came[model] = (requests + 1, tokens + prompt_tokens)

    def parked_changed(self, model: str, parked: int) -> None:
        """`parked` requests now wait for `model`."""
        if materially_changed(self._reported.get(model, 0), parked):
            self._due.set()

    def report(self, parking: Parking) -> DemandReport:
        """What is in demand now."""
        now = self._clock()
        self._rates = {model: rate for model, rate in self._rates.items() if rate.at(now) >= FAINT}
        models = sorted({*self._rates, *parking.models()})
        entries = [
            ModelDemand(
                model,
                parked=parking.count(model),
                oldest_parked_s=parking.oldest_s(model),
                arrivals_per_s=self._rates[model].at(now) if model in self._rates else 0.0,
                requests=self._came.get(model, (0, 0))[0],
                prompt_tokens=self._came.get(model, (0, 0))[1],
            )
            for model in models
        ]
        self._reported = {entry.model: entry.parked for entry in entries if entry.parked}
        return DemandReport(self._gateway, entries)

    async def run(self, bus: Bus, parking: Parking) -> None:
        """Report until cancelled: every INTERVAL_S, and within SPACING_S of a material change."""
        try:
            while True:
                self._due.clear()
                await self._tell(bus, lambda: self.report(parking))
                await asyncio.sleep(SPACING_S)
                try:
                    async with asyncio.timeout(INTERVAL_S - SPACING_S):
                        await self._due.wait()
                except TimeoutError:
                    continue
        finally:
            await self._tell(bus, lambda: DemandReport(self._gateway))

    async def _tell(self, bus: Bus, report: Callable[[], DemandReport]) -> None:
        """Publish a report. The next one stands in for one that fails; without any, no model would wake."""
        try:
            for part in split(report(), bus.max_payload):
                await bus.publish(subjects.demand(self._gateway), part)
        except (nats.errors.Error, OSError) as error:
            log.debug("demand not reported: %s", error or type(error).__name__)
        except Exception:
            log.exception("demand not reported, trying again in %.0f s; please report it", INTERVAL_S)
