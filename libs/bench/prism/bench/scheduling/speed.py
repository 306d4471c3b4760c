"""How fast the simulator itself is: a million requests at moderate load, and what overload costs."""

import time
from typing import Any

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.profiles import read_profile
from prism.bench.simulation.report import report
from prism.bench.simulation.scenario import make_scenario, simulate
from prism.bench.traces.synthetic import Synthetic, long_tailed_trace
from prism.common.messages.models import InitialPlacement, ModelSpec
from prism.scheduling.cost import model_cost

MODELS = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B")
GPUS = 8
MODERATE_RPS = 60.0
OVERLOAD = 5.0


def simulator_speed(requests: int, *, overload: bool = False, policy: str = "balanced") -> dict[str, Any]:
    """Wall seconds of one run on one core, and what the run was like; the trace and what models reach alone
    are there before the clock starts."""
    profile = read_profile("h100-80gb")
    models = []
    for index in range(GPUS):
        path = MODELS[index % len(MODELS)]
        facts = read_model_facts(f"m{index}", path, tokens_of_context=8192)
        spec = ModelSpec(f"m{index}", path, init_placements=[InitialPlacement([index])])
        models.append(SimulatedModel(index, spec, facts, model_cost(facts, profile)))
    shape = Synthetic(rate=MODERATE_RPS, duration_s=requests / MODERATE_RPS, alpha=1.2)
    trace = long_tailed_trace([model.name for model in models], shape, 1)
    scenario = make_scenario(trace, models, profile, profile.memory_bytes)
    began = time.perf_counter()
    outcome = simulate(
        scenario,
        gpus=GPUS,
        policy=policy,
        admission="moore_hodgson",
        rate_scale=OVERLOAD if overload else 1.0,
    )
    seconds = time.perf_counter() - began
    result = report(outcome)
    return {
        "seconds": seconds,
        "requests_per_s": requests / seconds,
        "both_attainment": result["both_attainment"],
        "longest_queue": result["longest_queue"],
        "plans": result["plans"],
        "admission_decisions": result["admission_decisions"],
    }
