"""What a call of a tensor factory asks for: `torch.empty(2, 3)`, `torch.zeros((2, 3), dtype=...)`, ..."""

from collections.abc import Mapping
from typing import Any

import torch


def asked_for(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the tensor that a factory makes of these arguments."""
    whole = len(args) == 1 and not isinstance(args[0], int)
    shape = kwargs["size"] if "size" in kwargs else args[0] if whole else args
    return tuple(shape), kwargs.get("dtype") or torch.get_default_dtype()
