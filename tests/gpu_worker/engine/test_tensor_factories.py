"""However a tensor factory is called, what it makes is known beforehand."""

from typing import Any

import pytest
import torch

from prism.gpu_worker.engine.tensor_factories import asked_for


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((2, 3), {}),
        (((2, 3),), {"dtype": torch.int8}),
        (([2, 3],), {}),
        ((torch.Size([4]),), {"dtype": torch.bfloat16, "device": "cpu"}),
        ((), {"size": (5, 1)}),
        ((7,), {"dtype": None}),
        (((),), {}),
    ],
)
def test_shape_and_dtype_are_those_of_the_tensor_that_torch_makes(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    made = torch.empty(*args, **kwargs)
    assert asked_for(args, kwargs) == (tuple(made.shape), made.dtype)
