"""What ranks on GPUs change; kvcached, which is installed where GPUs are, and SGLang are stood in for."""

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from prism.gpu_worker.engine import cuda_ranks


class Manager:
    """A pool that is begun by a thread, as kvcached's are."""

    def __init__(self, devices: dict[int, int]) -> None:
        self.begun_on = -1
        self._devices = devices
        thread = threading.Thread(target=self._post_init)
        thread.start()
        thread.join()

    def _post_init(self) -> None:
        self.begun_on = self._devices.get(threading.get_ident(), 0)


def mask() -> None:
    """What SGLang compiles."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """kvcached's interfaces and pools, SGLang's embedding."""
    embedding = SimpleNamespace(get_masked_input_and_mask=SimpleNamespace(_torchdynamo_orig_callable=mask))
    initialized: list[dict[str, Any]] = []
    interfaces = SimpleNamespace(init_kvcached=lambda **said: initialized.append(said))
    names = ["kvcached", "kvcached.integration", "kvcached.integration.sglang", "kvcached.kv_cache_manager"]
    names += ["sglang", "sglang.srt", "sglang.srt.layers"]
    modules = {name: ModuleType(name) for name in names}
    vars(modules["sglang.srt.layers"])["vocab_parallel_embedding"] = embedding
    vars(modules["kvcached.integration.sglang"])["interfaces"] = interfaces
    vars(modules["kvcached.kv_cache_manager"])["KVCacheManager"] = Manager
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Manager, "_post_init", Manager._post_init)
    return SimpleNamespace(interfaces=interfaces, initialized=initialized, embedding=embedding)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Which GPU each thread is on."""
    chosen: dict[int, int] = {}
    choose = chosen.__setitem__
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: choose(threading.get_ident(), gpu))
    return chosen


def test_a_pool_is_begun_on_its_ranks_own_gpu(engine: SimpleNamespace, devices: dict[int, int]) -> None:
    assert Manager(devices).begun_on == 0
    cuda_ranks.prepare(1)
    assert Manager(devices).begun_on == 1


def test_each_rank_maps_its_own_pages(engine: SimpleNamespace, devices: dict[int, int]) -> None:
    cuda_ranks.prepare(1)
    engine.interfaces.init_kvcached(tp_rank=1, world_size=2, pp_rank=0, async_sched=True)
    assert engine.initialized == [{"async_sched": True}]


def test_the_sharded_embedding_is_not_compiled(engine: SimpleNamespace, devices: dict[int, int]) -> None:
    cuda_ranks.prepare(1)
    assert engine.embedding.get_masked_input_and_mask is mask
