"""A model whose files change under a worker with real engines: no old weights under a new name."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.gpu_worker.worker_rig import Rig, send, store_process, tokens_of, worker_rig

from prism.cli.nats_server import NatsServer
from prism.common.errors import ErrorCode
from prism.common.messages.models import ModelState
from prism.common.messages.placement import CommandKind
from prism.gpu_worker.shells import ForkServerShells
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.fingerprint import identity_of

pytestmark = pytest.mark.engine

PROMPT, TOKENS = [5, 6, 7], 12


@pytest.fixture
async def rig(
    session_nats: NatsServer, tmp_path: Path, shells: ForkServerShells, tiny_models: dict[str, Path]
) -> AsyncIterator[Rig]:
    async with (
        store_process(session_nats, tmp_path) as store,
        worker_rig(session_nats, store, shells, tiny_models) as ready,
    ):
        yield ready


@pytest.fixture
def folder(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    """A model's folder, of this test's own."""
    return shutil.copytree(tiny_models["tiny-llama"], tmp_path / "model")


def version_of(folder: Path) -> str:
    return identity_of(read_checkpoint(folder)).version


def train_on(folder: Path) -> None:
    """Other weights in the same shape, as a model's next checkpoint has them."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, weights)


async def answer(rig: Rig, rid: str, version: str) -> list[int]:
    frames = await (await send(rig, rid, PROMPT, TOKENS, version=version)).all()
    assert frames[-1].error is None
    return tokens_of(frames)


async def test_a_request_for_another_version_than_the_engines_is_refused(rig: Rig, folder: Path) -> None:
    version = version_of(folder)
    await rig.command(CommandKind.ACTIVATE, path=folder, version=version)
    assert rig.load().version == version
    refused = await (await send(rig, "a", PROMPT, TOKENS, version="another")).next()
    assert refused is not None
    assert refused.error is not None
    assert (refused.error.code, refused.error.retry) == (ErrorCode.MOVED, True)
    assert await answer(rig, "b", version) == await answer(rig, "c", ""), "one that names none is served"


async def test_an_engine_that_sleeps_is_not_woken_for_another_version(rig: Rig, folder: Path) -> None:
    before = version_of(folder)
    await rig.command(CommandKind.ACTIVATE, path=folder, version=before)
    old = await answer(rig, "a", before)
    assert (await rig.command(CommandKind.DOZE)).state is ModelState.DOZING
    train_on(folder)
    after = version_of(folder)
    outcome = await rig.command(CommandKind.ACTIVATE, path=folder, version=after)
    assert outcome.error is None
    assert "stage" in outcome.seconds, "it was started, not woken"
    assert rig.load().version == after
    new = await answer(rig, "b", after)
    assert new != old
    assert (await rig.command(CommandKind.DOZE)).state is ModelState.DOZING
    assert "stage" not in (await rig.command(CommandKind.ACTIVATE, path=folder, version=after)).seconds
    assert await answer(rig, "c", after) == new


async def test_a_node_whose_folder_holds_another_version_starts_nothing(rig: Rig, folder: Path) -> None:
    outcome = await rig.command(CommandKind.ACTIVATE, path=folder, version="0" * 32)
    assert outcome.error is not None
    assert outcome.error.retry
    assert "holds another version of tiny-llama than the one that is registered" in outcome.error.message
    assert outcome.state is ModelState.COLD
    assert rig.worker.ledger.reserved_bytes == 0
    assert rig.load().version == ""
    outcome = await rig.command(CommandKind.ACTIVATE, path=folder, version=version_of(folder))
    assert outcome.state is ModelState.ACTIVE
