"""From a path to a folder: what can't be looked at is told as it is."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.model_store.conftest import Running
from tests.model_store.model_folders import write_model

from prism.common.errors import ErrorCode, PrismError
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.model_folder import is_hub_id, resolve_folder

pytestmark = pytest.mark.core


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder below which this process may not look, even where it may look everywhere."""
    folder = tmp_path / "another's home"
    look = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{folder}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    return folder


async def test_a_folder_that_may_not_be_looked_at_fails_the_model_with_path_and_reason(
    forbidden: Path,
) -> None:
    path = forbidden / "model"
    with pytest.raises(PrismError, match=rf"{path} cannot be read: Permission denied; .*user") as caught:
        await resolve_folder(str(path))
    assert caught.value.code is ErrorCode.MODEL_FAILED
    assert not is_hub_id(str(path))


async def test_so_does_one_that_could_be_looked_at_before(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "m")
    assert await running.store.folder(str(folder)) == folder

    def stat(path: Any, **options: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(os, "stat", stat)
        with pytest.raises(PrismError, match=f"{folder} cannot be read: Input/output error"):
            await running.store.folder(str(folder))
    assert await running.store.folder(str(folder)) == folder


async def test_a_name_of_the_hub_stays_one_where_the_working_folder_may_not_be_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stat(path: Any, **options: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", stat)
    assert is_hub_id("nobody/nothing")


async def test_a_download_that_can_not_be_begun_fails_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_descriptors(*command: Any, **options: Any) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_descriptors)
    with pytest.raises(PrismError, match=r"nobody/nothing .*Too many open files") as caught:
        await resolve_folder("nobody/nothing")
    assert caught.value.code is ErrorCode.MODEL_FAILED


def test_a_home_of_nobody_fails_the_model() -> None:
    with pytest.raises(PrismError, match="home directory"):
        asyncio.run(resolve_folder("~nobody-of-this-name/model"))


def test_a_file_of_a_folder_that_may_not_be_looked_at_fails_the_model(
    forbidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(forbidden)
    with pytest.raises(PrismError, match=r"generation_config\.json cannot be read: Permission denied"):
        read_checkpoint(forbidden)
