"""A model in the simulator: what was asked for, what it costs, what is promised."""

from math import inf

import msgspec

from prism.common.messages.models import ModelFacts, ModelSpec
from prism.scheduling.cost import ModelCost


class SimulatedModel(msgspec.Struct):
    """`index` is its place in the trace's models. Objectives in seconds; `max_new_tokens` is what its clients
    allow an answer to have at most."""

    index: int
    spec: ModelSpec
    facts: ModelFacts
    cost: ModelCost
    ttft_slo_s: float = inf
    tpot_slo_s: float = inf
    max_new_tokens: int = 4096

    @property
    def name(self) -> str:
        """Its name in the placement file."""
        return self.spec.model_name
