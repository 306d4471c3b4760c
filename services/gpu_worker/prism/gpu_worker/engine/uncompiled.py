"""Functions that SGLang has torch compile when they are first called, as they were before.

Compiling takes 10 to 20 s in each process, in the middle of a step: everybody's tokens wait for it, and an
engine that says nothing for so long counts as stuck.
"""

from collections.abc import Callable
from typing import Any


def plain(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What torch would have compiled."""
    original: Callable[..., Any] = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    return original


def penalties_uncompiled() -> None:
    """Have repetition penalties applied as they are written."""
    from sglang.srt.sampling import sampling_batch_info
    from sglang.srt.sampling.penaltylib import repetition_penalty

    apply = plain(repetition_penalty.apply_scaling_penalties)
    repetition_penalty.apply_scaling_penalties = apply
    sampling_batch_info.apply_scaling_penalties = apply
