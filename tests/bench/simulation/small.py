"""Simulations small enough to be worked out by hand: round costs, one model a name."""

from collections.abc import Sequence

from prism.bench.simulation.model import SimulatedModel
from prism.bench.simulation.simulation import Limits, Outcome, Simulation
from prism.bench.traces.trace import trace_of
from prism.common.messages.models import InitialPlacement, ModelFacts, ModelSpec
from prism.scheduling.admission import AdmissionPolicy, FirstComeAdmission
from prism.scheduling.cost import GpuProfile, ModelCost
from prism.scheduling.placement import LruPlacement, PlacementPolicy

PROFILE = GpuProfile("round", 1000, 1.0, 1.0, 1.0)
KV_BYTES = 4

Row = tuple[float, int, int, int]


def cost(
    *,
    prefill_fixed_s: float = 0.5,
    prefill_token_s: float = 0.01,
    decode_fixed_s: float = 0.1,
    decode_kv_token_s: float = 0.0,
    weights_bytes: int = 100,
    wake_s: float = 2.0,
) -> ModelCost:
    """A prefill of 50 tokens takes a second, a step a tenth of one; a token's KV cache takes KV_BYTES."""
    return ModelCost(
        weights_bytes=weights_bytes,
        kv_bytes_per_token=KV_BYTES,
        prefill_fixed_s=prefill_fixed_s,
        prefill_token_s=prefill_token_s,
        decode_fixed_s=decode_fixed_s,
        decode_sequence_s=0.0,
        decode_kv_token_s=decode_kv_token_s,
        wake_s=wake_s,
        thaw_s=wake_s + 1,
        staged_s=wake_s + 1,
        cold_s=wake_s + 10,
        doze_s=0.25,
    )


def model(
    index: int,
    costs: ModelCost | None = None,
    *,
    gpus: Sequence[int] = (0,),
    kv_tokens: int = 10_000,
    on: bool = True,
    max_new_tokens: int = 100,
) -> SimulatedModel:
    """The model `m<index>`, at home on `gpus`."""
    costs = costs or cost()
    placement = InitialPlacement(list(gpus), on, kv_tokens * KV_BYTES / 1e9)
    facts = ModelFacts(
        f"m{index}",
        parameters=costs.weights_bytes * len(gpus) // KV_BYTES,
        kv_elements_per_token=len(gpus),
        context_length=1000,
        checkpoint_dtype="float32",
    )
    spec = ModelSpec(f"m{index}", f"m{index}", tp_size=len(gpus), init_placements=[placement])
    return SimulatedModel(index, spec, facts, costs, max_new_tokens=max_new_tokens)


def simulation(
    models: Sequence[SimulatedModel],
    rows: Sequence[Row],
    *,
    gpus: int = 1,
    memory_bytes: int = 1_000_000,
    placement: PlacementPolicy | None = None,
    admission: AdmissionPolicy | None = None,
    limits: Limits | None = None,
    profile: GpuProfile = PROFILE,
) -> Simulation:
    """Rows are arrival, model, prompt tokens, output tokens."""
    return Simulation(
        trace_of([each.name for each in models], rows),
        models,
        gpus=gpus,
        gpu_memory_bytes=memory_bytes,
        profile=profile,
        placement=placement or LruPlacement(),
        admission=admission or FirstComeAdmission(),
        limits=limits or Limits(),
    )


def run(models: Sequence[SimulatedModel], rows: Sequence[Row], **settings: object) -> Outcome:
    """As `simulation`, run."""
    return simulation(models, rows, **settings).run()  # type: ignore[arg-type]  # as there
