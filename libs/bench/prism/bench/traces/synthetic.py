"""Made-up traces: bursts, unequal popularity, models that come and go. The same seed, the same trace."""

import random
from array import array
from collections.abc import Sequence

import msgspec

from prism.bench.traces.trace import Trace, trace_of


class Synthetic(msgspec.Struct, frozen=True):
    """What a synthetic trace is like.

    `rate` requests a second in all for `duration_s` seconds; gaps are Gamma distributed with a coefficient of
    variation `cv` (1: Poisson); the model is int(N * Power(alpha)), so that a higher `alpha` concentrates
    more on the last ones, reversed here such that the first model is the hottest. Lengths are uniform between
    the two bounds. With `on_s`, a model alternates between phases of being asked for (`on_s` seconds on
    average, exponential) and silence (`off_s`); requests for one that is silent go to one that is not.
    """

    rate: float
    duration_s: float = 60.0
    cv: float = 1.0
    alpha: float = 2.1
    prompt_tokens: tuple[int, int] = (256, 512)
    output_tokens: tuple[int, int] = (256, 512)
    on_s: float = 0.0
    off_s: float = 0.0


def synthetic_trace(models: Sequence[str], shape: Synthetic, seed: int) -> Trace:
    """A trace for `models`. The number of requests is rate * duration, as in the reference's generator."""
    random_ = random.Random(seed)
    count = max(1, round(shape.rate * shape.duration_s))
    gamma_shape, gamma_scale = 1 / shape.cv**2, shape.cv**2 / shape.rate
    phases = [_Phases(random_, shape) for _ in models] if shape.on_s > 0 else []
    rows = []
    now = 0.0
    for _ in range(count):
        now += random_.gammavariate(gamma_shape, gamma_scale)
        model = _model(random_, len(models), shape.alpha)
        if phases:
            model = _awake(random_, phases, model, now, len(models), shape.alpha)
        prompt, output = random_.randint(*shape.prompt_tokens), random_.randint(*shape.output_tokens)
        rows.append((now, model, prompt, output))
    return trace_of(models, rows, sort=False)


def long_tailed_trace(models: Sequence[str], shape: Synthetic, seed: int) -> Trace:
    """As `synthetic_trace`, with lengths as people's chats have them: log-normal, prompts of p50 40 and p90
    430 tokens, outputs of p50 210 and p90 510, none over 1,020."""
    trace = synthetic_trace(models, shape, seed)
    random_ = random.Random(seed ^ 0x5EED)
    prompts = array("l", (_log_normal(random_, 40, 1.85, 1020) for _ in range(len(trace))))
    outputs = array("l", (_log_normal(random_, 210, 0.69, 980) for _ in range(len(trace))))
    return Trace(trace.models, trace.arrival_s, trace.model, prompts, outputs)


class _Phases:
    """Whether one model is asked for, over time."""

    def __init__(self, random_: random.Random, shape: Synthetic) -> None:
        self._random = random_
        self._means = (shape.on_s, shape.off_s)
        self._off = random_.random() * (shape.on_s + shape.off_s) >= shape.on_s
        self._until = random_.expovariate(1 / self._means[self._off]) if self._means[self._off] else 0.0

    def on(self, now: float) -> bool:
        """Whether it is asked for at `now`, which never goes back."""
        while self._until <= now:
            self._off = not self._off
            mean = self._means[self._off]
            self._until += self._random.expovariate(1 / mean) if mean else 0.0
            if not any(self._means):
                return True
        return not self._off


def _model(random_: random.Random, models: int, alpha: float) -> int:
    # numpy's Power(alpha) is U ** (1 / alpha).
    return models - 1 - min(models - 1, int(models * random_.random() ** (1 / alpha)))


def _awake(
    random_: random.Random, phases: list[_Phases], model: int, now: float, models: int, alpha: float
) -> int:
    for _ in range(32):
        if phases[model].on(now):
            return model
        model = _model(random_, models, alpha)
    return model


def _log_normal(random_: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(median * random_.lognormvariate(0.0, sigma))))
