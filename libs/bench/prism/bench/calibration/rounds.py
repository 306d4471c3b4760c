"""Rounds of measurements: everything once, then everything again, so that no figure hangs on what else the
machine did during the seconds that it was measured in. Between them a workload that is served."""

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import httpx

from prism.bench.calibration.fitting import fitted_cost, fitted_profile, prefill_slowdown
from prism.bench.calibration.probing import (
    Beside,
    Probe,
    Timed,
    beside_once,
    probe_once,
    served_models,
    slowdown_once,
)
from prism.bench.calibration.replaying import joined, replay
from prism.bench.calibration.serving import fitted_to_served, serving_trace
from prism.bench.traces.trace import Trace
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelFacts
from prism.scheduling.cost import GpuProfile, ModelCost

SERVING_SEED = 101


class Rounds:
    """What was measured so far of a running system's models, one after the other and all at once. Nobody
    else should use the system while `measure` runs."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        contexts: Mapping[str, int],
        facts: Mapping[str, ModelFacts],
        base: GpuProfile,
        *,
        pass_tokens: int,
        element_bytes: int | None,
        tell: Callable[[str], None],
    ) -> None:
        """`contexts`: the models to measure, and how long each one's context is. What measuring does not tell
        comes from `facts` and `base`; weights have `element_bytes`, None for the checkpoint's own. Engines
        prefill `pass_tokens` at once; `tell` hears what is under way."""
        self._client = client
        self._contexts = dict(contexts)
        self._facts = dict(facts)
        self._base = base
        self._pass_tokens = pass_tokens
        self._element_bytes = element_bytes
        self._tell = tell
        # Not those of a calibration before this one: its prompts may still be in the engines' caches.
        self._random = random.Random()
        self._run = self._random.getrandbits(64)
        self._rounds = self._servings = 0
        self._probes: dict[str, list[Probe]] = {model: [] for model in contexts}
        self._slowdowns: list[float] = []
        self._beside: dict[str, list[Beside]] = {model: [] for model in contexts}
        self._served: list[Trace] = []
        self._seen: list[Timed] = []

    async def measure(self, rounds: int) -> None:
        """Take so many rounds more. Raises PrismError where the system does not answer."""
        for _ in range(rounds):
            self._rounds += 1
            for model, context in self._contexts.items():
                self._tell(f"round {self._rounds}: {model}")
                self._probes[model].append(
                    await probe_once(self._client, model, context, self._pass_tokens, self._random)
                )
            if len(self._contexts) > 1 and await self._all_awake():
                self._tell(f"round {self._rounds}: all at once")
                slowdowns = await slowdown_once(self._client, self._contexts, self._random)
                seen = await beside_once(self._client, self._contexts, self._pass_tokens, self._random)
                if await self._all_awake():
                    self._slowdowns += slowdowns
                    for beside in seen:
                        self._beside[beside.model].append(beside)

    async def serve(self, duration_s: float) -> None:
        """Have so many seconds more of a workload served, which costs are fitted to; at least a round was
        measured before. Nothing is where models don't fit in memory together: they would wait for each other
        to sleep. Raises PrismError where the system does not answer."""
        if not await self._all_awake():
            return
        self._tell(f"serving for {duration_s:g} s")
        self._servings += 1
        trace = serving_trace(
            self._probed_costs(),
            min(self._contexts.values()),
            self._pass_tokens,
            duration_s=duration_s,
            seed=SERVING_SEED + self._servings,
        )
        seen = await replay(self._client, trace, f"{self._run}/{self._servings}")
        if await self._all_awake():
            self._served.append(trace)
            self._seen += seen

    async def _all_awake(self) -> bool:
        told = await served_models(self._client)
        asleep = {
            model: told.get(model, {}).get("reason") or "it sleeps"
            for model in self._contexts
            if told.get(model, {}).get("state") != "ready"
        }
        if asleep:
            why = "; ".join(f"{model}: {reason}" for model, reason in asleep.items())
            self._tell(
                f"not awake with the others, so nothing is measured of all at once: {why} (where there is "
                "too little memory for all, give the worker more or measure those that fit together: --model)"
            )
        return not asleep

    def fitted(self, name: str) -> tuple[GpuProfile, dict[str, ModelCost]]:
        """The device and its models by all rounds so far (see `usual`), and by what was served, if any was;
        what they do not tell is as on the base."""
        costs = self._probed_costs()
        steps = prefills = 1.0 if len(costs) == 1 else None
        if self._slowdowns:
            steps = usual(self._slowdowns)
            prefills = prefill_slowdown([usual_beside(seen) for seen in self._beside.values()], costs)

        def profile_of(costs: Mapping[str, ModelCost]) -> GpuProfile:
            return fitted_profile(
                costs, self._facts, self._base, slowdown=steps, prefill_slowdown=prefills, name=name
            )

        if self._served:
            trace = joined(self._served)
            costs = fitted_to_served(
                trace, self._seen, self._facts, costs, profile_of(costs), self._pass_tokens
            )
        return profile_of(costs), costs

    def _probed_costs(self) -> dict[str, ModelCost]:
        return {
            model: fitted_cost(usual_probe(seen), self._facts[model], self._base, self._element_bytes)
            for model, seen in self._probes.items()
        }


def usual(seen: Sequence[float]) -> float:
    """The mean without the least and the greatest: a machine that is slow a third of the time is so in what
    its clients see on the mean, where a median would not know of it; one outlier says nothing."""
    middle = sorted(seen)[1:-1] if len(seen) > 2 else seen
    return fmean(middle)


def usual_probe(seen: Sequence[Probe]) -> Probe:
    """Of one model's: each figure as it usually is."""
    first = seen[0]
    return Probe(
        first.model,
        first.pass_tokens,
        {length: usual([each.first_token_s[length] for each in seen]) for length in first.first_token_s},
        first.burst_tokens,
        {count: usual([each.burst_s[count] for each in seen]) for count in first.burst_s},
        [
            (batch, held, usual([each.steps[place][2] for each in seen]))
            for place, (batch, held, _) in enumerate(first.steps)
        ],
    )


def usual_beside(seen: Sequence[Beside]) -> Beside:
    """Of one model's: both times as they usually are."""
    return Beside(
        seen[0].model,
        seen[0].prompt_tokens,
        usual([each.alone_s for each in seen]),
        usual([each.beside_s for each in seen]),
    )


async def served_contexts(client: httpx.AsyncClient, models: Sequence[str]) -> dict[str, int]:
    """How long the context of each of `models` is. Raises PrismError for one that is not served."""
    served = await served_models(client)
    missing = [model for model in models if model not in served]
    if missing:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"{client.base_url} does not serve {', '.join(missing)}")
    return {model: served[model].get("context_length") or 2048 for model in models}
