"""What the worker knows of the image of an engine."""

import asyncio
import logging

import pytest

from prism.common.errors import ErrorBody, ErrorCode, PrismError
from prism.gpu_worker import image_export
from prism.gpu_worker.engine_protocol import Imaged
from prism.gpu_worker.image_export import ImageExport


async def test_whoever_asks_waits_for_an_image_on_its_way() -> None:
    image = ImageExport("m")
    asked = asyncio.create_task(image.exists())
    await asyncio.sleep(0)
    assert not asked.done()
    image.told(Imaged(0.5))
    assert await asked


async def test_an_export_that_failed_leaves_none_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    image = ImageExport("m")
    with caplog.at_level(logging.WARNING):
        image.told(Imaged(0.0, ErrorBody(ErrorCode.STORE_UNAVAILABLE, "the disk is full")))
    assert not await image.exists()
    assert "the disk is full" in caplog.text


async def test_the_next_engine_starts_from_nothing() -> None:
    image = ImageExport("m")
    image.told(Imaged(0.0, ErrorBody(ErrorCode.STORE_UNAVAILABLE, "the disk is full")))
    image.begin()
    image.settled()
    assert await image.exists()


async def test_whoever_waits_for_an_image_learns_at_once_that_its_engine_is_lost() -> None:
    image = ImageExport("m")
    asked = asyncio.create_task(image.exists())
    await asyncio.sleep(0)
    image.lost()
    assert not await asked
    image.begin()
    image.settled()
    assert await image.exists(), "that is the next engine's"


async def test_an_image_that_was_exported_outlives_its_engine() -> None:
    image = ImageExport("m")
    image.told(Imaged(0.5))
    image.lost()
    assert await image.exists()


async def test_an_image_that_does_not_come_is_told_and_may_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_export, "IMAGE_DEADLINE_S", 0.0)
    with pytest.raises(PrismError, match="still being exported") as refused:
        await ImageExport("m").exists()
    assert refused.value.retry
