"""What the schedulers are compared on: models of published shapes, and traces for them by seed."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.model_config import read_model_facts
from prism.bench.simulation.profiles import read_profile
from prism.bench.simulation.scenario import Scenario, make_scenario
from prism.bench.traces.reading import read_trace
from prism.bench.traces.synthetic import Synthetic, long_tailed_trace, synthetic_trace
from prism.bench.traces.trace import Trace, replicated
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelSpec
from prism.scheduling.cost import model_cost

PROFILE = "h100-80gb"
GPU_MEMORY_BYTES = 76_000_000_000
CONTEXT_LENGTH = 8192
TRACE_HEAD = "shared/traces/arena_head.csv"

LLAMA_1B, LLAMA_3B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"
LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"
QWEN_1B, QWEN_3B, QWEN_7B = "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B"
QWEN_14B, QWEN_32B = "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B"
TENSOR_PARALLEL = {QWEN_32B: 2, LLAMA_70B: 4}
"""GPUs that an instance is spread over, where one of 80 GB does not hold it with room for its KV cache."""


class Workload(msgspec.Struct, frozen=True):
    """`models` are hub names, the hottest first; with `head`, the trace head is replayed instead of `shape`.

    Attainment is compared at each number of `gpus` and each of `rates`; the least number of GPUs is searched
    at `fleet_rate`, up to `most_gpus` (0: not searched). Rates divide all gaps, pauses too: which models are
    active changes `changes_per_hour` times at a rate of 1. In the paper's traces (arXiv 2505.04021) that is
    54 to 766 times, so fleets are sized there; higher rates ask how far it goes.
    """

    name: str
    models: tuple[str, ...]
    shape: Synthetic
    gpus: tuple[int, ...]
    rates: tuple[float, ...]
    fleet_rate: float = 1.0
    most_gpus: int = 0
    chats: bool = True
    head: bool = False

    @property
    def changes_per_hour(self) -> float:
        """How often a model begins or ends to be active, all models together, at a rate of 1."""
        cycle_s = self.shape.on_s + self.shape.off_s
        return 2 * 3600.0 * len(self.models) / cycle_s if self.shape.off_s > 0 else 0.0


def _interleaved(kinds: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """So many of each, spread evenly, so that popularity does not go with size."""
    order = [((place + 0.5) / count, kind) for kind, count in kinds for place in range(count)]
    return tuple(kind for _, kind in sorted(order))


EIGHTEEN = _interleaved(
    [(LLAMA_1B, 4), (QWEN_1B, 3), (LLAMA_3B, 3), (QWEN_3B, 2), (QWEN_7B, 3), (LLAMA_8B, 3)]
)
FIFTY_EIGHT = _interleaved(
    [
        (LLAMA_1B, 14),
        (QWEN_1B, 13),
        (LLAMA_3B, 8),
        (QWEN_3B, 8),
        (QWEN_7B, 4),
        (LLAMA_8B, 4),
        (QWEN_14B, 3),
        (QWEN_32B, 2),
        (LLAMA_70B, 2),
    ]
)

WORKLOADS = (
    Workload(
        "8_models",
        _interleaved([(LLAMA_1B, 4), (LLAMA_3B, 2), (LLAMA_8B, 2)]),
        Synthetic(rate=3.0, duration_s=120.0, cv=1.5, alpha=1.5, on_s=20.0, off_s=20.0),
        gpus=(2,),
        rates=(0.25, 0.5, 1.0, 2.0, 3.0),
        fleet_rate=0.5,
        most_gpus=16,
    ),
    Workload(
        "18_models",
        EIGHTEEN,
        Synthetic(rate=6.0, duration_s=120.0, cv=1.5, alpha=1.5, on_s=20.0, off_s=40.0),
        gpus=(2, 4, 8),
        rates=(0.25, 0.5, 1.0, 2.0),
        fleet_rate=0.25,
        most_gpus=32,
    ),
    Workload(
        "58_models",
        FIFTY_EIGHT,
        Synthetic(rate=10.0, duration_s=60.0, cv=1.5, alpha=1.5, on_s=20.0, off_s=40.0),
        gpus=(8, 16),
        rates=(0.1, 0.5, 1.0, 2.0),
        fleet_rate=0.1,
        most_gpus=64,
    ),
    Workload(
        "heterogeneous_4",
        (LLAMA_8B, LLAMA_1B, LLAMA_1B, LLAMA_3B),
        Synthetic(
            rate=3.0, duration_s=120.0, cv=1.0, alpha=1.3, prompt_tokens=(256, 2048), output_tokens=(64, 256)
        ),
        gpus=(2,),
        rates=(0.5, 1.0, 2.0, 3.0),
        chats=False,
    ),
    Workload(
        "trace_head",
        EIGHTEEN,
        Synthetic(rate=2.4, duration_s=300.0),
        gpus=(2, 4),
        rates=(0.5, 1.0, 2.0),
        most_gpus=32,
        head=True,
    ),
)


def workload(name: str) -> Workload:
    """The workload of that name."""
    return next(each for each in WORKLOADS if each.name == name)


def head_path(root: Path) -> Path | None:
    """The trace head beside the checkout, None where it is missing."""
    return next((path for path in (root / TRACE_HEAD, root.parent / TRACE_HEAD) if path.is_file()), None)


def scenario_of(load: Workload, seed: int, root: Path) -> Scenario:
    """The workload with that seed. The trace head has no seed: every seed above 0 shifts its models' ranks,
    so that other sizes are the hot ones. Raises PrismError when the trace head is missing."""
    profile = read_profile(PROFILE)
    models = []
    for index, path in enumerate(load.models):
        name = f"m{index:02}"
        spec = ModelSpec(name, path, tp_size=TENSOR_PARALLEL.get(path, 1))
        facts = read_model_facts(name, path, tokens_of_context=CONTEXT_LENGTH)
        models.append(SimulatedModel(index, spec, facts, model_cost(facts, profile, tp_size=spec.tp_size)))
    trace = _trace(load, seed, [model.name for model in models], root)
    return make_scenario(trace, models, profile, GPU_MEMORY_BYTES)


def _trace(load: Workload, seed: int, names: list[str], root: Path) -> Trace:
    if load.head:
        path = head_path(root)
        if path is None:
            raise PrismError(
                ErrorCode.INVALID_REQUEST, f"{TRACE_HEAD} is not beside the checkout: {load.name} is left out"
            )
        trace = replicated(read_trace([path]), 1)
        counts = trace.counts()
        ranked = sorted(trace.models, key=lambda name: (-counts[name], name))
        turned = {name: names[(rank + 5 * seed) % len(names)] for rank, name in enumerate(ranked)}
        index = {name: place for place, name in enumerate(names)}
        model = trace.model.__class__("l", (index[turned[trace.models[m]]] for m in trace.model))
        return Trace(tuple(names), trace.arrival_s, model, trace.prompt_tokens, trace.output_tokens)
    make = long_tailed_trace if load.chats else synthetic_trace
    return make(names, load.shape, seed)
