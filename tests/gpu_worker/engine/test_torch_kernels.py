"""The operations that a warm shell launches beforehand are ones that torch has."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from prism.gpu_worker.engine.torch_kernels import load_common_kernels

pytestmark = pytest.mark.core


class _Launched(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


def test_what_each_engine_launches_first_is_launched_and_no_product_of_matrices() -> None:
    with _Launched() as launched:
        load_common_kernels("cpu")
    assert {"pow", "cos", "sin", "cumsum", "_foreach_copy_", "embedding", "index", "argmax"} <= launched.names
    assert not {"mm", "addmm", "bmm"} & launched.names
