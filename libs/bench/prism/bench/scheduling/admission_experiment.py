"""Who goes first on a shared GPU: Moore-Hodgson against first come first served and earliest deadline first,
on two co-located models whose objectives lie a factor apart."""

import random
from typing import Any

import msgspec

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.profiles import read_profile
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import admission_policy
from prism.bench.simulation.simulation import Simulation
from prism.bench.traces.trace import trace_of
from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.scheduling.cost import model_cost
from prism.scheduling.placement import LruPlacement

MODEL = "meta-llama/Llama-3.1-8B"
FACTOR = 8.0
POLICIES = ("moore_hodgson", "edf", "first_come")
CV = 2.0


class Prompts(msgspec.Struct, frozen=True):
    """The shortest and the longest, in tokens, and the tight objective: about six times what one takes alone.
    `loads` are prefill loads, prompts counted one by one: of the short ones many more fit than that, because
    those that are prefilled together share what a pass costs."""

    shortest: int
    longest: int
    tight_slo_s: float
    loads: tuple[float, ...]
    duration_s: float


LONG = Prompts(1000, 6000, 1.0, (0.7, 0.9, 1.1), 600.0)
SHORT = Prompts(50, 200, 0.2, (0.7, 1.1, 2.0, 4.0), 120.0)


def compare(
    load: float, seed: int, prompts: Prompts = LONG, profile_name: str = "h100-80gb"
) -> dict[str, dict[str, Any]]:
    """By policy: attainment of the tight and the loose model and in all, the longest wait, at a prefill load
    of `load` times what the GPU can do. Answers are short: the queue is what counts."""
    profile = read_profile(profile_name)
    facts = read_model_facts("m", MODEL, tokens_of_context=8192)
    cost = model_cost(facts, profile)
    random_ = random.Random(seed)
    mean_s = cost.prefill_s((prompts.shortest + prompts.longest) // 2)
    rows, now = [], 0.0
    while now < prompts.duration_s:
        now += random_.gammavariate(1 / CV**2, CV**2 * mean_s / load)
        rows.append((now, random_.randrange(2), random_.randint(prompts.shortest, prompts.longest), 2))
    models = [
        SimulatedModel(
            index,
            ModelSpec(f"m{index}", MODEL, init_placements=[InitialPlacement([0], True, 10.0)]),
            msgspec.structs.replace(facts, model=f"m{index}"),
            cost,
            ttft_slo_s=slo,
            max_new_tokens=2,
        )
        for index, slo in enumerate((prompts.tight_slo_s, FACTOR * prompts.tight_slo_s))
    ]
    found = {}
    for policy in POLICIES:
        outcome = Simulation(
            trace_of(("m0", "m1"), rows),
            models,
            gpus=1,
            gpu_memory_bytes=profile.memory_bytes,
            profile=profile,
            placement=LruPlacement(),
            admission=admission_policy(policy),
        ).run()
        result = report(outcome)
        waits = [
            ttft / models[model].ttft_slo_s
            for ttft, model in zip(outcome.ttft_s, outcome.trace.model, strict=True)
            if ttft == ttft
        ]
        found[policy] = {
            "tight": result["models"]["m0"]["ttft_attainment"],
            "loose": result["models"]["m1"]["ttft_attainment"],
            "all": result["ttft_attainment"],
            "longest_wait_in_objectives": max(waits),
            "unserved": result["requests"] - result["completed"],
        }
    return found
