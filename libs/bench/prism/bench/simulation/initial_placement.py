"""The best initial placement that a search finds which knows the trace: what baselines are given.

A model's load on a GPU is known from its requests: seconds of the GPU that they take a second (its share),
and the KV cache that they hold on average. Homes are searched that keep the fullest GPU as empty as can be,
in compute and in memory, by moving and swapping models one at a time from several starts; the candidates that
the search ends in are then simulated, and the one that serves most is taken.
"""

import random
from collections.abc import Sequence
from typing import Any

import msgspec

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import Scenario, simulate
from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.scheduling.memory import GB

STARTS = 6
STEPS = 400
BATCH_GUESS = 4
BURST = 3.0
LEAST_KV_TOKENS = 4096
WEIGHTS = ((1.0, 1.0), (1.0, 0.3), (0.3, 1.0))


class _Load(msgspec.Struct, frozen=True):
    """Of one model, on each GPU of an instance: share of its time, bytes of weights and of KV cache."""

    share: float
    weights: int
    kv: int
    requests: int
    tp_size: int


def model_loads(scenario: Scenario, rate_scale: float) -> list[_Load]:
    """What each model asks of a GPU over the whole trace."""
    count = len(scenario.models)
    requests, prompts, outputs = [0] * count, [0] * count, [0] * count
    trace = scenario.trace
    for model, prompt, output in zip(trace.model, trace.prompt_tokens, trace.output_tokens, strict=True):
        requests[model] += 1
        prompts[model] += prompt
        outputs[model] += output
    seconds = max(1.0, trace.duration_s) / rate_scale
    return [
        _load(model, requests[model.index], prompts[model.index], outputs[model.index], seconds)
        for model in scenario.models
    ]


def _load(model: SimulatedModel, requests: int, prompts: int, outputs: int, seconds: float) -> _Load:
    cost = model.cost
    mean = (prompts + outputs) / max(1, requests)
    step = cost.decode_step_s(BATCH_GUESS, BATCH_GUESS * mean) / BATCH_GUESS
    prefill = requests * cost.prefill_fixed_s + prompts * cost.prefill_token_s
    streams = outputs * cost.decode_step_s(1, mean) / seconds
    kv_tokens = max(LEAST_KV_TOKENS, BURST * streams * mean)
    return _Load(
        (prefill + outputs * step) / seconds,
        cost.weights_bytes + cost.context_bytes,
        round(kv_tokens * cost.kv_bytes_per_token),
        requests,
        model.spec.tp_size,
    )


def searched_placements(
    scenario: Scenario, *, gpus: int, seed: int, rate_scale: float = 1.0, **settings: Any
) -> list[ModelSpec]:
    """Specs whose initial placements are the best found. Models that fit nowhere beside the others have
    none."""
    best: tuple[float, list[ModelSpec]] | None = None
    seen = set()
    for homes in _candidates(scenario, gpus, seed, rate_scale):
        key = tuple(homes)
        if key in seen:
            continue
        seen.add(key)
        specs = _specs(scenario, homes, gpus, rate_scale)
        outcome = simulate(scenario, gpus=gpus, rate_scale=rate_scale, placements=specs, **settings)
        reached = report(outcome)["both_attainment"] or 0.0
        if best is None or reached > best[0]:
            best = (reached, specs)
    assert best is not None
    return best[1]


def _groups(gpus: int, tp_size: int, node: int) -> list[tuple[int, ...]]:
    """Where an instance of so many GPUs can be: groups of neighbours on one worker."""
    if tp_size == 1:
        return [(gpu,) for gpu in range(gpus)]
    return [
        tuple(range(start, start + tp_size))
        for first in range(0, gpus, node)
        for start in range(first, min(first + node, gpus) - tp_size + 1, tp_size)
    ]


def _candidates(scenario: Scenario, gpus: int, seed: int, rate_scale: float) -> list[list[tuple[int, ...]]]:
    """The homes of each model, empty for none, that each start of the search with each weighing ends in."""
    loads = model_loads(scenario, rate_scale)
    node = max(load.tp_size for load in loads)
    groups = {load.tp_size: _groups(gpus, load.tp_size, node) for load in loads}
    found = []
    for start in range(STARTS):
        random_ = random.Random(f"{seed}/{start}")
        for compute, memory in WEIGHTS:
            search = _Search(loads, groups, gpus, scenario.gpu_memory_bytes, compute, memory)
            found.append(search.run(random_, noise=0.3 * start))
    return found


class _Search:
    """One local search: homes of models on GPUs that hold `capacity` bytes each."""

    def __init__(
        self,
        loads: Sequence[_Load],
        groups: dict[int, list[tuple[int, ...]]],
        gpus: int,
        capacity: int,
        compute: float,
        memory: float,
    ) -> None:
        self._loads = loads
        self._groups = groups
        self._capacity = capacity
        self._compute = compute
        self._memory = memory
        self._share = [0.0] * gpus
        self._bytes = [0] * gpus
        self._least = [0] * gpus
        self._homes: list[tuple[int, ...]] = [()] * len(loads)

    def run(self, random_: random.Random, noise: float) -> list[tuple[int, ...]]:
        """Greedy from the heaviest, disturbed by `noise`, then moves and swaps as long as they help."""
        loads = self._loads

        def weight(index: int) -> float:
            load = loads[index]
            disturbed = 1 + noise * random_.random()
            return -disturbed * load.tp_size * max(load.share, (load.weights + load.kv) / self._capacity)

        # Those that are asked for come first: where not all fit, the others are left out.
        for index in sorted(range(len(loads)), key=lambda each: (loads[each].requests == 0, weight(each))):
            self._settle(index)
        for _ in range(STEPS):
            if not self._improve(random_):
                break
        return list(self._homes)

    def _settle(self, index: int) -> None:
        load = self._loads[index]
        fitting = [group for group in self._groups[load.tp_size] if self._fits(index, group)]
        if fitting:
            self._put(index, min(fitting, key=lambda group: (self._pressure_with(index, group), group)))

    def _fits(self, index: int, group: tuple[int, ...]) -> bool:
        load = self._loads[index]
        least = load.weights + min(load.kv, self._capacity // 50)
        return bool(group) and all(self._least[gpu] + least <= self._capacity for gpu in group)

    def _put(self, index: int, group: tuple[int, ...], sign: int = 1) -> None:
        load = self._loads[index]
        for gpu in group:
            self._share[gpu] += sign * load.share
            self._bytes[gpu] += sign * (load.weights + load.kv)
            self._least[gpu] += sign * (load.weights + min(load.kv, self._capacity // 50))
        self._homes[index] = group if sign > 0 else ()

    def _pressure(self, gpu: int) -> float:
        return max(self._compute * self._share[gpu], self._memory * self._bytes[gpu] / self._capacity)

    def _pressure_with(self, index: int, group: tuple[int, ...]) -> float:
        load = self._loads[index]
        return max(
            max(
                self._compute * (self._share[gpu] + load.share),
                self._memory * (self._bytes[gpu] + load.weights + load.kv) / self._capacity,
            )
            for gpu in group
        )

    def _cost(self, gpus: set[int]) -> list[float]:
        return sorted((self._pressure(gpu) for gpu in gpus), reverse=True)

    def _improve(self, random_: random.Random) -> bool:
        """One move or swap that lowers the pressure of the fuller of the GPUs it touches, the fullest GPU
        first."""
        order = sorted(range(len(self._share)), key=lambda gpu: -self._pressure(gpu))
        for crowded in order:
            models = [index for index, home in enumerate(self._homes) if crowded in home]
            random_.shuffle(models)
            for index in models:
                if self._move(index) or self._swap(index):
                    return True
        return False

    def _move(self, index: int) -> bool:
        home = self._homes[index]
        for group in self._groups[self._loads[index].tp_size]:
            if group == home:
                continue
            touched = {*home, *group}
            before = self._cost(touched)
            self._put(index, home, -1)
            if self._fits(index, group):
                self._put(index, group)
                if self._cost(touched) < before:
                    return True
                self._put(index, group, -1)
            self._put(index, home)
        return False

    def _swap(self, index: int) -> bool:
        home = self._homes[index]
        for other, group in enumerate(self._homes):
            alike = self._loads[other].tp_size == self._loads[index].tp_size
            if not alike or not group or group == home:
                continue
            touched = {*home, *group}
            before = self._cost(touched)
            self._put(index, home, -1)
            self._put(other, group, -1)
            if self._fits(index, group):
                self._put(index, group)
                if self._fits(other, home):
                    self._put(other, home)
                    if self._cost(touched) < before:
                        return True
                    self._put(other, home, -1)
                self._put(index, group, -1)
            self._put(index, home)
            self._put(other, group)
        return False


def _specs(
    scenario: Scenario, homes: Sequence[tuple[int, ...]], gpus: int, rate_scale: float
) -> list[ModelSpec]:
    """Specs with those homes; what is left of each GPU is divided by what its models' KV caches need."""
    loads = model_loads(scenario, rate_scale)
    free = [float(scenario.gpu_memory_bytes)] * gpus
    wanted = [0.0] * gpus
    for load, home in zip(loads, homes, strict=True):
        for gpu in home:
            free[gpu] -= load.weights
            wanted[gpu] += load.kv
    specs = []
    for model, load, home in zip(scenario.models, loads, homes, strict=True):
        placements = []
        if home:
            pool = min(free[gpu] * load.kv / wanted[gpu] for gpu in home) * 0.999
            placements = [InitialPlacement(list(home), True, max(1e-6, pool / GB))]
        specs.append(msgspec.structs.replace(model.spec, init_placements=placements))
    return specs
