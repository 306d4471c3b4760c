"""What the gateway has counted by itself, to hold a client's figures against."""

from prometheus_client.parser import text_string_to_metric_families


class GatewayCounts:
    """One reading of /metrics."""

    def __init__(self, exposition: str) -> None:
        self._values = {
            (sample.name.removeprefix("prism_gateway_"), frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(exposition)
            for sample in family.samples
        }

    def requests(self, endpoint: str, status: int, model: str) -> int:
        """Requests that ended so."""
        return self._value("requests_total", endpoint=endpoint, status=str(status), model=model)

    def prompt_tokens(self, model: str) -> int:
        """Tokens of prompts."""
        return self._value("prompt_tokens_total", model=model)

    def generated_tokens(self, model: str) -> int:
        """Tokens that came from workers."""
        return self._value("generated_tokens_total", model=model)

    def in_flight(self) -> int:
        """Requests in progress."""
        return self._value("in_flight")

    def _value(self, name: str, **labels: str) -> int:
        return int(self._values.get((name, frozenset(labels.items())), 0))
