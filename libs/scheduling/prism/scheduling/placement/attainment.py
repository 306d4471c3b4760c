"""How many requests keep both of their promises: what pressure on a GPU makes of them.

The share that does falls with pressure, slowly at first and steeply near 1. `CURVE` is what simulations
showed (18, 58, 8 models and the trace head, 3 seeds, rates from 0.5 to 4, 64,000 requests, each counted at
the pressure under which its GPU was at the last look before it came). Requests a second times that share is
at its highest near a pressure of 1: beyond, whoever has fewer requests for its work than the others takes
more from them than it gets.
"""

import math
from collections.abc import Iterable

from prism.scheduling.placement.gpus import Gpu, Instance, Place
from prism.scheduling.placement.pressure import Work

CURVE = ((0.0, 1.0), (0.5, 0.99), (0.7, 0.97), (0.8, 0.93), (1.0, 0.8), (1.2, 0.62), (1.5, 0.46), (2.0, 0.28))
"""Pressure, and the share of requests that kept both objectives under it."""

UNQUEUED = 0.82
QUEUEING = 0.22
"""What queues say of pressure, which is foreseen from a minute's traffic: with none of them it weighs less
than it seems, with many more."""


def felt(pressure: float, queued: int) -> float:
    """Foreseen pressure as it weighs where so many requests are queued."""
    return pressure * (UNQUEUED + QUEUEING * math.log1p(queued))


def kept_share(pressure: float, queued: int = 0) -> float:
    """The share of requests that keep both objectives on a GPU under `pressure` where so many are queued."""
    pressure = felt(pressure, queued)
    before, high = CURVE[0]
    for after, low in CURVE[1:]:
        if pressure <= after:
            return high + (low - high) * (pressure - before) / (after - before)
        before, high = after, low
    return high * before / pressure


def kept_per_s(gpu: Gpu) -> float:
    """Requests a second of the models on `gpu` that keep both objectives."""
    return gpu.requests_per_s * kept_share(gpu.pressure, gpu.queued)


def gain_of(
    place: Place,
    work: Work,
    nbytes: int,
    victims: Iterable[Instance] = (),
    in_turns: Iterable[Instance] = (),
) -> float:
    """How many more requests a second keep their objectives with one more instance on the GPUs of `place`,
    whose weights and context take `nbytes`, and without the `victims`, wherever else those are too. Those
    with whom it is there `in_turns` give it their memory, and their requests are served all the same.
    Negative: fewer."""
    victims, in_turns = tuple(victims), tuple(in_turns)
    gain = 0.0
    also = dict.fromkeys(gpu for victim in victims for gpu in victim.place.gpus if gpu not in place.gpus)
    for gpu in (*place.gpus, *also):
        before = kept_per_s(gpu)
        gone = [victim for victim in victims if gpu in victim.place.gpus]
        for victim in gone:
            gpu.lose(victim.work, victim.resident.weights_bytes)
        if gpu in also:
            after = kept_per_s(gpu)
        else:
            lent = sum(one.resident.weights_bytes for one in in_turns if gpu in one.place.gpus)
            after = (gpu.requests_per_s + work.requests_per_s) * kept_share(
                gpu.with_work(work, nbytes - lent), gpu.queued
            )
        gain += after - before
        for victim in gone:
            gpu.take(victim.work, victim.resident.weights_bytes)
    return gain
