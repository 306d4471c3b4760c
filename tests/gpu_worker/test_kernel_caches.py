"""Where compiled kernels stay."""

import os
from pathlib import Path

import pytest

from prism.gpu_worker.engine import cuda_shell
from prism.gpu_worker.kernel_caches import INDUCTOR, TRITON, TVM_FFI, kernel_caches

pytestmark = pytest.mark.core


def test_what_torch_compiles_for_an_engine_stays_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/home/somebody", "TMPDIR": "/tmp/of-this-start"})
    cuda_shell.prepare_environment(7, 0)
    assert os.environ[INDUCTOR] == "/home/somebody/.cache/prism/inductor"
    assert kernel_caches(Path("/home/somebody"), {})["torch"] == Path(os.environ[INDUCTOR])


def test_another_place_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/home/somebody", INDUCTOR: "/kernels/torch"})
    cuda_shell.prepare_environment(7, 0)
    assert os.environ[INDUCTOR] == "/kernels/torch"
    places = {INDUCTOR: "/kernels/torch", TRITON: "/kernels/triton", TVM_FFI: "/kernels/sglang"}
    chosen = kernel_caches(Path("/home/somebody"), places)
    assert chosen == {
        "Triton": Path("/kernels/triton"),
        "flashinfer": Path("/home/somebody/.cache/flashinfer"),
        "torch": Path("/kernels/torch"),
        "SGLang": Path("/kernels/sglang"),
    }
