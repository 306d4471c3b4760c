"""What is counted for every token, in Prometheus' terms but by plain additions: the ready-made counters take
a lock and look up their labels each time."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector


class ModelTokens:
    """Tokens of one model: how many, and the time between them. Only for the event loop's thread."""

    __slots__ = ("_bounds", "counts", "generated", "seconds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.generated = 0
        self.seconds = 0.0

    def interval(self, seconds: float) -> None:
        """So much time passed from one token to the next."""
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.seconds += seconds


class TokenMetrics(Collector):
    """All models' tokens, as a collector."""

    def __init__(self, prefix: str, bounds: Sequence[float]) -> None:
        self._prefix = prefix
        self._bounds = tuple(bounds)
        self._models: dict[str, ModelTokens] = {}

    def of(self, model: str) -> ModelTokens:
        """Those of `model`."""
        tokens = self._models.get(model)
        if tokens is None:
            tokens = self._models[model] = ModelTokens(self._bounds)
        return tokens

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        """As they are now."""
        generated = CounterMetricFamily(
            f"{self._prefix}generated_tokens", "tokens received from workers", labels=["model"]
        )
        intervals = HistogramMetricFamily(
            f"{self._prefix}inter_token_seconds",
            "time between frames over the tokens they brought",
            labels=["model"],
        )
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for model, tokens in self._models.items():
            generated.add_metric([model], tokens.generated)
            total = 0
            buckets = []
            for bound, count in zip(bounds, tokens.counts, strict=True):
                total += count
                buckets.append((bound, total))
            intervals.add_metric([model], buckets, sum_value=tokens.seconds)
        yield generated
        yield intervals
