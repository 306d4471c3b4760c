"""Engines on an NVIDIA GPU: CUDA graphs for decoding, the KV cache under kvcached."""

from collections.abc import Callable
from functools import partial
from typing import Any

from prism.gpu_worker.engine import cuda_ranks
from prism.gpu_worker.engine.cuda_weights import CudaModelWeights
from prism.gpu_worker.engine.deferred_graphs import DeferredGraphs
from prism.gpu_worker.engine.kvcached_memory import KvcachedMemory
from prism.gpu_worker.engine.ranks import Ranks
from prism.gpu_worker.engine.weights import ModelWeights
from prism.gpu_worker.engine_protocol import StartEngine


class CudaPlatform:
    """SGLang on one of the GPUs that this process sees: a rank's own."""

    one_memory = False

    def __init__(self, start: StartEngine, ranks: Ranks) -> None:
        self.gpu = ranks.rank
        self._ranks = ranks
        self.weights_class: Callable[..., ModelWeights] = partial(CudaModelWeights, gpu=self.gpu)
        self._limit_bytes = start.kv_bytes
        # Several ranks would each capture when they think fit; all have to do it together.
        alone = ranks.size == 1
        self._defers = alone and start.options.defer_graphs and bool(start.options.decode_graph_sizes)
        self.graphs: DeferredGraphs | None = None

    def prepare(self) -> None:
        """Graphs wait if they shall; kvcached's patch is there since SGLang was imported."""
        from sglang.srt.model_executor.model_runner import ModelRunner

        if self._defers:
            self.graphs = DeferredGraphs(ModelRunner)
        if self._ranks.size > 1:
            cuda_ranks.prepare(self.gpu)

    def server_args(self, start: StartEngine) -> dict[str, Any]:
        """Decode graphs for the chosen batch sizes, none for prefill, batches prepared while one runs."""
        sizes = [size for size in start.options.decode_graph_sizes if size <= start.max_running_requests]
        if start.max_running_requests not in sizes:
            sizes.append(start.max_running_requests)
        graphs = {"cuda_graph_bs_decode": sizes, "cuda_graph_max_bs_decode": sizes[-1]}
        return {
            "device": "cuda",
            "attention_backend": start.options.attention_backend,
            "disable_prefill_cuda_graph": True,
            # Its buffers are shared between processes, which the driver's checkpoints can't take.
            "disable_custom_all_reduce": self._ranks.size > 1,
            **(graphs if start.options.decode_graph_sizes else {"disable_cuda_graph": True}),
        }

    def kv_memory(self, scheduler: Any) -> KvcachedMemory:
        """kvcached's pool, within its quota from here on."""
        return KvcachedMemory(scheduler, self._limit_bytes)

    def arenas(self, weights: ModelWeights) -> tuple[int, int]:
        """The driver counts this memory, no file does."""
        return -1, -1
