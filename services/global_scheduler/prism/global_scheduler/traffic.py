"""Traffic of all models, from the counters that gateways and workers report."""

from prism.common.messages.load import DemandReport, LoadReport
from prism.scheduling.traffic import Traffic, TrafficWindow

MOST_AT_ONCE = 1000
"""Arrivals between two reports of a model that are told apart in time; more are told as so many."""


class TrafficWatch:
    """A window for each model. Counters only grow while their reporter lives; one that has shrunk is a new
    reporter's. The first report of a reporter is where counting begins."""

    def __init__(self) -> None:
        self._windows: dict[str, TrafficWindow] = {}
        self._arrived: dict[str, tuple[float, dict[str, tuple[int, int]]]] = {}
        self._generated: dict[str, dict[str, int]] = {}

    def demand(self, report: DemandReport, now: float) -> None:
        """Take a gateway's counters."""
        before_at, before = self._arrived.get(report.gateway, (now, None))
        counted = dict(before or {})
        for model in report.models:
            known = counted.get(model.model, (0, 0))
            requests, tokens = model.requests - known[0], model.prompt_tokens - known[1]
            if requests < 0:
                requests, tokens = model.requests, model.prompt_tokens
            counted[model.model] = (model.requests, model.prompt_tokens)
            if before is not None and requests > 0:
                self._spread(model.model, requests, tokens, before_at, now)
        self._arrived[report.gateway] = (now, counted)

    def _spread(self, model: str, requests: int, tokens: int, since: float, now: float) -> None:
        """Requests that came between two reports came evenly, for all that is known."""
        window = self._windows.setdefault(model, TrafficWindow())
        told = min(requests, MOST_AT_ONCE)
        for number in range(1, told + 1):
            window.arrived(since + (now - since) * number / told, tokens // told, requests / told)

    def load(self, report: LoadReport, now: float) -> None:
        """Take a worker's counters."""
        before = self._generated.get(report.worker)
        for model in report.models:
            tokens = model.generated_tokens - (before or {}).get(model.model, 0)
            tokens = model.generated_tokens if tokens < 0 else tokens
            if before is not None and tokens > 0:
                self._windows.setdefault(model.model, TrafficWindow()).generated(now, tokens)
        self._generated[report.worker] = {model.model: model.generated_tokens for model in report.models}

    def forget_worker(self, worker: str) -> None:
        """A worker is gone."""
        self._generated.pop(worker, None)

    def forget_gateway(self, gateway: str) -> None:
        """A gateway is gone."""
        self._arrived.pop(gateway, None)

    def at(self, model: str, now: float) -> Traffic:
        """A model's traffic as of `now`."""
        window = self._windows.get(model)
        return window.at(now) if window is not None else Traffic()
