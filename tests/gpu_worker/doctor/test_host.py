"""What doctor says of the host around the GPU, from real files."""

import resource
from pathlib import Path

import pytest

from prism.gpu_worker.doctor import host
from prism.gpu_worker.doctor.findings import Verdict, fails
from prism.gpu_worker.doctor.packages import Probe

GIB = 1 << 30


def no_program(_: str) -> str | None:
    return None


def test_memfds_and_shared_memory_are_there_on_this_host() -> None:
    assert host.check_memfd().verdict is Verdict.OK
    assert host.check_shared_memory().verdict is Verdict.OK


def test_a_folder_that_is_not_there_is_no_shared_memory(tmp_path: Path) -> None:
    assert fails([host.check_shared_memory(tmp_path / "shm")])


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("always within_size advise [never] deny force\n", Verdict.SLOW),
        ("always within_size [advise] never deny force\n", Verdict.OK),
        ("[always] within_size advise never deny force\n", Verdict.OK),
    ],
)
def test_huge_pages_go_by_the_chosen_word(tmp_path: Path, words: str, verdict: Verdict) -> None:
    setting = tmp_path / "shmem_enabled"
    setting.write_text(words)
    assert host.check_huge_pages(setting).verdict is verdict


def test_a_kernel_without_the_setting_is_not_judged(tmp_path: Path) -> None:
    assert host.check_huge_pages(tmp_path / "none").verdict is Verdict.UNKNOWN


def test_a_limit_of_locked_memory_is_told() -> None:
    assert host.check_locked_memory(resource.RLIM_INFINITY).verdict is Verdict.OK
    assert host.check_locked_memory(8 << 20).verdict is Verdict.NOTE


def test_host_memory_should_hold_a_gpu_of_sleeping_models() -> None:
    assert host.check_host_memory(32 * GIB, GIB, 0).verdict is Verdict.OK
    assert host.check_host_memory(100 * GIB, GIB, 140 * GIB).verdict is Verdict.SLOW
    assert host.check_host_memory(200 * GIB, GIB, 140 * GIB).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("rate", "verdict"), [(None, Verdict.UNKNOWN), (6e9, Verdict.SLOW), (55e9, Verdict.OK)]
)
def test_the_bus_is_judged_by_its_rate(rate: float | None, verdict: Verdict) -> None:
    assert host.check_bandwidth(Probe(pinned_bytes_per_s=rate)).verdict is verdict


def test_without_a_compiler_only_cached_kernels_help(tmp_path: Path) -> None:
    assert fails(host.check_compiler(tmp_path, {}, no_program))
    (tmp_path / ".cache" / "flashinfer" / "norm").mkdir(parents=True)
    nvcc, *_ = host.check_compiler(tmp_path, {}, no_program)
    assert nvcc.verdict is Verdict.MISSING
    assert "SGLang" in nvcc.found
    assert "flashinfer" not in nvcc.found
    assert str(tmp_path / ".cache" / "tvm-ffi") in nvcc.fix
    (tmp_path / ".cache" / "tvm-ffi" / "rope").mkdir(parents=True)
    nvcc, triton, flashinfer, _, sglang = host.check_compiler(tmp_path, {}, no_program)
    assert (nvcc.verdict, triton.verdict) == (Verdict.SLOW, Verdict.SLOW)
    assert (flashinfer.verdict, sglang.verdict) == (Verdict.OK, Verdict.OK)
    nvcc, *_ = host.check_compiler(tmp_path, {}, lambda _: "/opt/cuda/bin/nvcc")
    assert nvcc.verdict is Verdict.OK


def test_an_empty_cache_of_torch_is_as_it_should_be_with_one_gpu(tmp_path: Path) -> None:
    *_, torch, _ = host.check_compiler(tmp_path, {}, no_program)
    assert torch.verdict is Verdict.OK
    assert "several GPUs" in torch.found


def test_mps_is_told_from_its_pipe(tmp_path: Path) -> None:
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert "not installed" in host.check_mps(environment, no_program).found
    (tmp_path / "control").touch()
    assert "runs" in host.check_mps(environment, no_program).found
