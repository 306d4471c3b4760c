"""A model on a worker: its state, its memory, its engine."""

from prism.bench.simulation.admission import AdmissionQueue
from prism.bench.simulation.engine import Engine
from prism.bench.simulation.gpu import Gpu
from prism.bench.simulation.model import SimulatedModel
from prism.common.messages.models import ModelState

NO_LIMIT = 1 << 60


class Instance:
    """Bytes are held on each of its `gpus`; `reserved` are KV tokens that its running requests may come to
    take, `quota_tokens` those that its quota holds. `queue` is the admission queue that its requests go
    through; its engine has run something without a break since `busy_since`."""

    __slots__ = (
        "active_bytes",
        "busy_since",
        "context_bytes",
        "engine",
        "gpus",
        "idle_since",
        "model",
        "queue",
        "queued",
        "queued_tokens",
        "quota_bytes",
        "quota_tokens",
        "reserved",
        "running",
        "state",
        "state_at",
        "weights_bytes",
        "worker",
    )

    def __init__(self, model: SimulatedModel, worker: str, state: ModelState) -> None:
        self.model = model
        self.worker = worker
        self.state = state
        self.state_at = 0.0
        self.gpus: tuple[Gpu, ...] = ()
        self.engine: Engine | None = None
        self.queue: AdmissionQueue | None = None
        self.weights_bytes = 0
        self.quota_bytes = 0
        self.quota_tokens = 0 if model.cost.kv_bytes_per_token else NO_LIMIT
        self.context_bytes = 0
        self.active_bytes = 0
        self.running = 0
        self.reserved = 0
        self.queued = 0
        self.queued_tokens = 0
        self.busy_since = 0.0
        self.idle_since = 0.0

    @property
    def load(self) -> int:
        """Requests queued and running."""
        return self.running + self.queued

    @property
    def wanted_bytes(self) -> int:
        """KV cache that its requests, queued ones included, would take."""
        return (self.reserved + self.queued_tokens) * self.model.cost.kv_bytes_per_token

    @property
    def used_bytes(self) -> int:
        """KV cache that its requests hold."""
        if self.engine is None:
            return 0
        return round(self.engine.kv_tokens) * self.model.cost.kv_bytes_per_token

    def enter(self, state: ModelState, now: float) -> None:
        """Be in `state` from `now` on."""
        self.state = state
        self.state_at = now

    def hold(self, *, weights: int, quota: int, context: int) -> None:
        """Have exactly so many bytes reserved on each of its GPUs."""
        more = weights + quota + context - self.weights_bytes - self.quota_bytes - self.context_bytes
        for gpu in self.gpus:
            gpu.reserved_bytes += more
            if weights + quota + context:
                gpu.residents[self.model.name] = self
            else:
                gpu.residents.pop(self.model.name, None)
        self.weights_bytes, self.quota_bytes, self.context_bytes = weights, quota, context
        per_token = self.model.cost.kv_bytes_per_token
        self.quota_tokens = quota // per_token if per_token else NO_LIMIT
