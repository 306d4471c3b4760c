"""Policies over time on one GPU: two models with objectives 8 times apart, served one prefill after
another."""

import random
from dataclasses import dataclass

import pytest

from prism.scheduling.admission import (
    Bounds,
    EngineCapacity,
    PrefillBacklog,
    PrefillCost,
    QueuedRequest,
    make_policy,
)

pytestmark = pytest.mark.core

RATE = 10_000.0
MEAN_PREFILL_S = (1100 + 7000) / 2 / RATE
SECONDS = 120.0
COST = PrefillCost(0.0, 1 / RATE)
ENGINES = {model: EngineCapacity(0, 10**6, 10**12, prefill_tokens_per_s=RATE) for model in ("tight", "loose")}


@dataclass
class Served:
    """Of one model: how many were on time of how many, and the longest wait in objectives."""

    met: int = 0
    count: int = 0
    longest: float = 0.0


def arrivals(load: float, seed: int) -> list[QueuedRequest]:
    """Short prompts with 1 s to go and long ones with 8 s, that keep the GPU busy for `load` of the time."""
    chance = random.Random(seed)
    requests: list[QueuedRequest] = []
    at = 0.0
    while at < SECONDS:
        at += chance.expovariate(load / MEAN_PREFILL_S)
        tight = chance.random() < 0.5
        prompt = chance.randint(200, 2000) if tight else chance.randint(2000, 12000)
        model, slo = ("tight", 1.0) if tight else ("loose", 8.0)
        requests.append(QueuedRequest(f"{len(requests):06}", model, at, prompt, 64, at + 1e9, ttft_slo_s=slo))
    return requests


def serve(policy_name: str, load: float, seed: int) -> dict[str, Served]:
    """Release as the policy says until everybody was served."""
    bounds = Bounds()
    policy, backlog = make_policy(policy_name, bounds), PrefillBacklog()
    coming = arrivals(load, seed)[::-1]
    queue: dict[str, QueuedRequest] = {}
    served = {model: Served() for model in ENGINES}
    now, free_at = 0.0, 0.0
    again: float | None = None
    while coming or queue:
        events = [request.arrival_s for request in coming[-1:]]
        now = max(now, min(events if again is None else [*events, again]))
        while coming and coming[-1].arrival_s <= now:
            arrived = coming.pop()
            queue[arrived.rid] = arrived
        admission = policy.select(list(queue.values()), ENGINES, backlog.work(now), now)
        for rid in admission.rids:
            request = queue.pop(rid)
            overaged = bounds.waited(request, ENGINES[request.model], now) > 0
            backlog.released(rid, request.model, request.prompt_tokens, COST, now, overaged=overaged)
            free_at = max(free_at, now) + request.prompt_tokens / RATE
            waited = (free_at - request.arrival_s) / request.ttft_slo_s
            of = served[request.model]
            of.count += 1
            of.met += waited <= 1
            of.longest = max(of.longest, waited)
        again = None if admission.again_at_s is None else max(admission.again_at_s, now + 1e-4)
    return served


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", [0.8, 0.95])
def test_the_tight_model_is_on_time_and_nobody_starves(load: float, seed: int) -> None:
    slack, fifo = serve("moore_hodgson", load, seed), serve("first_come", load, seed)
    assert slack["tight"].count == fifo["tight"].count
    assert slack["tight"].met >= 1.4 * fifo["tight"].met
    patience = Bounds().patience
    assert max(of.longest for of in slack.values()) <= 1.5 * patience


@pytest.mark.parametrize("seed", range(3))
def test_overload_is_no_worse_for_all_than_for_those_who_cannot_be_served(seed: int) -> None:
    slack, edf = serve("moore_hodgson", 1.3, seed), serve("edf", 1.3, seed)
    assert sum(of.met for of in slack.values()) >= 2 * sum(of.met for of in edf.values())
    assert sum(of.met for of in slack.values()) >= 0.6 * sum(of.count for of in slack.values())
