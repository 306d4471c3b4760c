"""The steps in which SGLang builds an engine, and how long each takes."""

import functools
import time
from collections.abc import Callable
from typing import Any

# Methods of SGLang's ModelRunner, in their order, by the name of the step.
MODEL_RUNNER_STEPS = {
    "init_torch_distributed": "process_group",
    "load_model": "weights",
    "init_memory_pool": "kv_pool",
    "init_attention_backends": "attention",
    "init_cuda_graphs": "graphs",
}


Ended = Callable[[str, float], None]


def follow(owner: Any, steps: dict[str, str], ended: Ended) -> None:
    """Have `ended` called with a step's name and seconds after each of the methods of class `owner` that
    `steps` names; what it lacks is passed over: it is another version's."""
    for method, step in steps.items():
        original = getattr(owner, method, None)
        if original is not None:
            setattr(owner, method, _timed(original, step, ended))


def _timed(
    original: Callable[..., Any], step: str, ended: Callable[[str, float], None]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = original(*args, **kwargs)
        ended(step, time.perf_counter() - began)
        return result

    return timed
