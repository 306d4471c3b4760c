"""What a shell's environment must be before kvcached is imported."""

import os

import pytest

from prism.gpu_worker.engine.cuda_shell import prepare_environment
from prism.gpu_worker.kvcached_segments import segment_name

pytestmark = pytest.mark.core


def test_each_process_has_a_pool_of_its_own_whatever_it_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"KVCACHED_IPC_NAME": "prism-1"})
    prepare_environment(7, 1)
    assert os.environ["KVCACHED_IPC_NAME"] == segment_name(7, 1)


def test_kvcached_leaves_what_is_cached_and_what_is_free_to_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(7, 0)
    assert int(os.environ["KVCACHED_MAX_CACHED_TOKENS"]) < 0, "no bound on cached prefixes but the quota"
    kept_free = 1 - float(os.environ["KVCACHED_GPU_UTILIZATION"])
    h200_gib, worker_leaves_gib = 140, 4
    assert kept_free * h200_gib < worker_leaves_gib / 2, "quotas may use all that the worker gives out"


def test_workspaces_of_cublas_are_small_unless_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_environment(7, 0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
    monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    prepare_environment(7, 0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
