"""What the worker knows of the image that an engine exports of itself: without one it can't doze."""

import asyncio
import logging

from prism.common.errors import ErrorCode, PrismError
from prism.common.telemetry import about
from prism.gpu_worker.engine_protocol import Imaged

log = logging.getLogger(__name__)

IMAGE_DEADLINE_S = 20.0


class ImageExport:
    """The image of one engine: on its way, there, or not to be had."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._settled = asyncio.Event()
        self._error: str | None = None

    def begin(self) -> None:
        """An engine starts: nothing is known of its image."""
        self._settled.clear()
        self._error = None

    def settled(self) -> None:
        """There is an image."""
        self._settled.set()

    def told(self, message: Imaged) -> None:
        """What the engine says when it has exported its image, or could not."""
        self._settled.set()
        if message.error is not None:
            self._error = message.error.message
            log.warning(
                "no image for waking, it will start anew instead of dozing: %s",
                message.error.message,
                extra=about(model=self._model),
            )
        else:
            log.info("image exported in %.2f s", message.seconds, extra=about(model=self._model))

    def lost(self) -> None:
        """The engine is gone: an image that was on its way never comes."""
        if not self._settled.is_set():
            self._error = "its engine is gone"
            self._settled.set()

    async def exists(self) -> bool:
        """Whether there is an image to wake from; waits for one that is on its way.

        Raises PrismError(store_unavailable, retry) when that takes longer than IMAGE_DEADLINE_S.
        """
        try:
            async with asyncio.timeout(IMAGE_DEADLINE_S):
                await self._settled.wait()
        except TimeoutError as error:
            raise PrismError(
                ErrorCode.STORE_UNAVAILABLE, f"the image of {self._model} is still being exported", retry=True
            ) from error
        return self._error is None
