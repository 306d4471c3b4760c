"""The best initial placement that a search finds which knows the trace: what baselines are given.

A model's load on a GPU is known from its requests: how much of the GPU's time they take (its share), how
often its engine computes at all (each engine that does slows the others' steps), and the KV cache that they
hold. Homes are searched that keep the fullest GPU as empty as can be in all three, by moving and swapping
models one at a time from several starts. What the search ends in, and the file's own placement, is then
simulated; from the one that serves most, further moves and swaps are tried in the simulator itself.
"""

import random
from collections.abc import Sequence
from math import exp
from typing import Any

import msgspec

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import FIXED_QUOTAS, Scenario, simulate, within
from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.scheduling.memory import GB

STARTS = 3
STEPS = 400
LARGEST_BATCH = 256
BURST = 3.0
LEAST_KV_TOKENS = 4096
TRIES = 8
WEIGHTS = ((1.0, 1.0, 0.3), (1.0, 0.3, 0.0), (0.3, 0.3, 1.0), (0.3, 1.0, 0.3))
"""How much share, memory and activity count for, in each search."""

Homes = list[tuple[int, ...]]
"""The GPUs of each model's only instance, none where it has none."""


class _Load(msgspec.Struct, frozen=True):
    """Of one model, on each GPU of an instance: share of its time, how often it computes (0 to 1), bytes of
    weights and of KV cache."""

    share: float
    activity: float
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
    tokens_per_s = outputs / seconds
    # The batch at which a step gives as many tokens as are asked for.
    batch = 1.0
    for _ in range(20):
        batch = min(LARGEST_BATCH, tokens_per_s * cost.decode_step_s(max(1, round(batch)), batch * mean))
    decoding = cost.decode_step_s(max(1, round(batch)), max(1.0, batch) * mean) / max(1.0, batch)
    prefill = (requests * cost.prefill_fixed_s + prompts * cost.prefill_token_s) / seconds
    kv_tokens = max(LEAST_KV_TOKENS, BURST * batch * mean)
    return _Load(
        prefill + tokens_per_s * decoding,
        1 - exp(-(batch + prefill)),
        cost.weights_bytes + cost.context_bytes,
        round(kv_tokens * cost.kv_bytes_per_token),
        requests,
        model.spec.tp_size,
    )


def searched_placements(
    scenario: Scenario, *, gpus: int, seed: int, rate_scale: float = 1.0, enough: float = 1.0, **settings: Any
) -> list[ModelSpec]:
    """Specs whose initial placements are the best found; one that reaches `enough` will do. Models that fit
    nowhere beside the others have none."""
    pools = settings["policy"] in FIXED_QUOTAS
    loads = model_loads(scenario, rate_scale)
    tried: dict[tuple[tuple[int, ...], ...], float] = {}

    def specs_of(homes: Homes) -> list[ModelSpec]:
        return _specs(scenario, loads, homes, gpus, pools=pools)

    def reached(homes: Homes) -> float:
        key = tuple(homes)
        if key not in tried:
            outcome = simulate(
                scenario, gpus=gpus, rate_scale=rate_scale, placements=specs_of(homes), **settings
            )
            tried[key] = report(outcome)["both_attainment"] or 0.0
        return tried[key]

    searches, candidates = _candidates(scenario, loads, gpus, seed)
    best = candidates[0]
    for homes in candidates:
        if reached(homes) > reached(best):
            best = homes
        if reached(best) >= enough:
            return specs_of(best)
    random_ = random.Random(f"{seed}/tries")
    for _ in range(TRIES):
        other = searches[0].neighbour(best, random_)
        if reached(other) > reached(best):
            best = other
        if reached(best) >= enough:
            break
    return specs_of(best)


def _groups(gpus: int, tp_size: int, node: int) -> list[tuple[int, ...]]:
    """Where an instance of so many GPUs can be: groups of neighbours on one worker."""
    if tp_size == 1:
        return [(gpu,) for gpu in range(gpus)]
    return [
        tuple(range(start, start + tp_size))
        for first in range(0, gpus, node)
        for start in range(first, min(first + node, gpus) - tp_size + 1, tp_size)
    ]


def _candidates(
    scenario: Scenario, loads: Sequence[_Load], gpus: int, seed: int
) -> tuple[list["_Search"], list[Homes]]:
    """The searches, and the homes of each model, empty for none, that each start of each ends in; the file's
    own are among them where they fit."""
    node = max(load.tp_size for load in loads)
    groups = {load.tp_size: _groups(gpus, load.tp_size, node) for load in loads}
    searches = [_Search(loads, groups, gpus, scenario.gpu_memory_bytes, weights) for weights in WEIGHTS]
    found = [
        search.run(random.Random(f"{seed}/{start}"), noise=0.3 * start)
        for start in range(STARTS)
        for search in searches
    ]
    specs, _ = within([model.spec for model in scenario.models], gpus)
    own = [tuple(spec.init_placements[0].gpu_ids) if spec.init_placements else () for spec in specs]
    if searches[0].holds(own):
        found.append(own)
    return searches, list({tuple(homes): homes for homes in found}.values())


class _Search:
    """One local search: homes of models on GPUs that hold `capacity` bytes each."""

    def __init__(
        self,
        loads: Sequence[_Load],
        groups: dict[int, list[tuple[int, ...]]],
        gpus: int,
        capacity: int,
        weights: tuple[float, float, float],
    ) -> None:
        self._loads = loads
        self._groups = groups
        self._capacity = capacity
        self._compute, self._memory, self._activity = weights
        self._share = [0.0] * gpus
        self._active = [0.0] * gpus
        self._bytes = [0] * gpus
        self._least = [0] * gpus
        self._homes: Homes = [()] * len(loads)

    def run(self, random_: random.Random, noise: float) -> Homes:
        """Greedy from the heaviest, disturbed by `noise`, then moves and swaps as long as they help."""
        loads = self._loads
        self._clear()

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

    def holds(self, homes: Homes) -> bool:
        """Whether memory suffices for those homes."""
        self._clear()
        for index, home in enumerate(homes):
            if home and not self._fits(index, home):
                return False
            self._put(index, home)
        return True

    def neighbour(self, homes: Homes, random_: random.Random) -> Homes:
        """Other homes, of one model or of two that change places, where memory suffices; else the same
        ones."""
        for _ in range(32):
            found = list(homes)
            index = random_.randrange(len(homes))
            if random_.random() < 0.5:
                found[index] = random_.choice(self._groups[self._loads[index].tp_size])
            else:
                other = random_.randrange(len(homes))
                if self._loads[index].tp_size == self._loads[other].tp_size:
                    found[index], found[other] = found[other], found[index]
            if found != homes and self.holds(found):
                return found
        return list(homes)

    def _clear(self) -> None:
        for index, home in enumerate(self._homes):
            self._put(index, home, -1)

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
            self._active[gpu] += sign * load.activity
            self._bytes[gpu] += sign * (load.weights + load.kv)
            self._least[gpu] += sign * (load.weights + min(load.kv, self._capacity // 50))
        self._homes[index] = group if sign > 0 else ()

    def _pressure(self, gpu: int, share: float = 0.0, activity: float = 0.0, nbytes: int = 0) -> float:
        """How full a GPU is, or would be with so much more."""
        return max(
            self._compute * (self._share[gpu] + share),
            self._memory * (self._bytes[gpu] + nbytes) / self._capacity,
            self._activity * (self._active[gpu] + activity),
        )

    def _pressure_with(self, index: int, group: tuple[int, ...]) -> float:
        load = self._loads[index]
        nbytes = load.weights + load.kv
        return max(self._pressure(gpu, load.share, load.activity, nbytes) for gpu in group)

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
    scenario: Scenario, loads: Sequence[_Load], homes: Homes, gpus: int, *, pools: bool
) -> list[ModelSpec]:
    """Specs with those homes. With `pools`, what is left of each GPU is divided by what its models' KV caches
    need; otherwise quotas are left to whoever moves them."""
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
            placements = [InitialPlacement(list(home), True, max(1e-6, pool / GB) if pools else None)]
        specs.append(msgspec.structs.replace(model.spec, init_placements=placements))
    return specs
