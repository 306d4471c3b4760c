"""How long an admission decision takes, by the length of the queue."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median

import msgspec

from prism.scheduling.admission import (
    AdmissionPolicy,
    EngineCapacity,
    GpuWork,
    QueuedRequest,
    policies,
)

MODELS = 8
NOW_S = 100.0
LENGTHS = (1, 3, 10, 100, 1_000, 10_000)
SEED = 42


class AdmissionTime(msgspec.Struct, frozen=True):
    """Of `policy`, the median and the worst processor seconds of a decision with `queued` requests waiting.
    `load` says how they stand: all can be on time, about half of them can, or all are late."""

    policy: str
    load: str
    queued: int
    median_s: float
    worst_s: float


LOADS = {"on_time": (0.2, 1.0), "mixed": (0.0, 0.1), "late": (-10.0, -1.0)}
"""Seconds from now until first tokens are due: of those that are not late, times the number of requests, each
of which has about 0.1 s of prefill."""


def queue_of(length: int, load: str, seed: int = SEED) -> list[QueuedRequest]:
    """Requests of MODELS models that came in random order with random prompts."""
    chance = random.Random(seed)
    earliest, latest = LOADS[load]
    if load != "late":
        earliest, latest = earliest * length, latest * length + 0.05
    requests = []
    for index in range(length):
        due = NOW_S + chance.uniform(earliest, latest)
        # Objectives long enough for nobody to have waited beyond the bound: that would be another order.
        arrival = min(NOW_S - chance.uniform(0.001, 10.0), due - 2.0)
        requests.append(
            QueuedRequest(
                rid=f"{chance.getrandbits(128):032x}",
                model=f"model-{index % MODELS}",
                arrival_s=arrival,
                prompt_tokens=chance.randint(1, 2000),
                max_new_tokens=256,
                deadline_s=NOW_S + 600,
                ttft_slo_s=due - arrival,
            )
        )
    return requests


def engines() -> dict[str, EngineCapacity]:
    """Engines that run some requests, decode under a promise and prefill 10,000 tokens a second."""
    engine = EngineCapacity(
        running=8,
        max_running=256,
        kv_free_tokens=1_000_000,
        prefill_tokens_per_s=10_000.0,
        prefill_fixed_s=0.002,
        decoding=8,
        decode_step_s=0.01,
        tpot_slo_s=0.05,
    )
    return {f"model-{index}": engine for index in range(MODELS)}


def admission_time(policy: str, length: int, load: str, *, least_s: float = 0.3) -> AdmissionTime:
    """Time decisions over one queue again and again, for `least_s` seconds and 5 times at least."""
    decide: AdmissionPolicy = policies[policy]()
    queue, capacity, gpu = queue_of(length, load), engines(), GpuWork(0.0, 0.1)
    taken: list[float] = []
    ends = time.perf_counter() + least_s
    while len(taken) < 5 or time.perf_counter() < ends:
        # A decision only computes; what others do on the machine meanwhile is no part of it.
        began = time.thread_time()
        decide.select(queue, capacity, gpu, NOW_S)
        taken.append(time.thread_time() - began)
    return AdmissionTime(policy, load, length, median(taken), max(taken))


def worker_admission_times(policy: str, length: int, *, least_s: float = 0.3) -> list[AdmissionTime]:
    """Every load, in a process that has done nothing else, as a GPU's worker hasn't: after a million
    simulated requests a decision takes longer by half."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        return list(worker.map(partial(admission_time, policy, length, least_s=least_s), LOADS))


def admission_times(lengths: Sequence[int] = LENGTHS, *, least_s: float = 0.3) -> list[AdmissionTime]:
    """Every policy, length and load."""
    return [
        admission_time(policy, length, load, least_s=least_s)
        for policy in policies
        for length in lengths
        for load in LOADS
    ]


def main() -> None:
    """Print what was measured, one JSON object a line."""
    for row in admission_times():
        print(msgspec.json.encode(row).decode())


if __name__ == "__main__":
    main()
