"""What the gateway counts, in Prometheus' terms. A `model` label only ever holds a registered name."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prism.common.errors import ErrorCode
from prism.gateway.token_metrics import ModelTokens, TokenMetrics

UNKNOWN_MODEL = "unknown"
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.collectors = CollectorRegistry()

        def named(name: str) -> str:
            return f"prism_gateway_{name}"

        self._requests = Counter(
            named("requests"),
            "HTTP generation requests by outcome; 499: the client left",
            ["endpoint", "model", "status"],
            registry=self.collectors,
        )
        self._in_flight = Gauge(
            named("in_flight"), "generation requests in progress", registry=self.collectors
        )
        self._parked = Gauge(
            named("parked"), "generations waiting for their model", ["model"], registry=self.collectors
        )
        self._ttft = Histogram(
            named("time_to_first_token_seconds"),
            "from the request's arrival to its first token",
            ["model"],
            buckets=TTFT_BUCKETS,
            registry=self.collectors,
        )
        self._tokens = TokenMetrics(named(""), INTER_TOKEN_BUCKETS)
        self.collectors.register(self._tokens)
        self._prompt_tokens = Counter(
            named("prompt_tokens"), "tokens of prompts", ["model"], registry=self.collectors
        )
        self._slo = Counter(
            named("slo"),
            "generations that had an objective, by outcome",
            ["model", "objective", "outcome"],
            registry=self.collectors,
        )
        self._replays = Counter(
            named("replays"),
            "generations routed again, by reason",
            ["model", "reason"],
            registry=self.collectors,
        )

    def request_began(self) -> None:
        """A generation request came in."""
        self._in_flight.inc()

    def request_ended(self, endpoint: str, model: str | None, status: int) -> None:
        """It ended; `model` is None unless it names a registered one."""
        self._in_flight.dec()
        self._requests.labels(endpoint, model or UNKNOWN_MODEL, str(status)).inc()

    def parked(self, model: str, count: int) -> None:
        """`count` generations of `model` are parked."""
        self._parked.labels(model).set(count)

    def first_token(self, model: str, seconds: float) -> None:
        """A generation's first token came, so long after the request."""
        self._ttft.labels(model).observe(seconds)

    def tokens(self, model: str) -> ModelTokens:
        """What is counted for every token of `model`."""
        return self._tokens.of(model)

    def prompt(self, model: str, tokens: int) -> None:
        """A prompt of so many tokens is sent on its way."""
        self._prompt_tokens.labels(model).inc(tokens)

    def objective(self, model: str, objective: str, attained: bool) -> None:
        """A generation with a `ttft` or `tpot` objective ended, and kept it or not."""
        self._slo.labels(model, objective, "attained" if attained else "missed").inc()

    def replayed(self, model: str, reason: ErrorCode) -> None:
        """A generation was routed again."""
        self._replays.labels(model, reason.value).inc()

    def exposition(self) -> bytes:
        """All of it, in the text format."""
        return generate_latest(self.collectors)
