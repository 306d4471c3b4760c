"""Requests that were lost twice in a row go one at a time.

A request that ends every engine which it comes to takes all others there with it each time, and from outside
nothing tells it from them, until it is alone.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prism.common.errors import ErrorCode, PrismError


class Suspects:
    """Those of one gateway, by model."""

    def __init__(self) -> None:
        self._turns: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def alone(self, model: str, within_s: float) -> AsyncIterator[Callable[[], None]]:
        """No other suspect of `model` is under way until the block ends, or calls what it gets: once its
        request has a token it is none any more.

        Raises PrismError(deadline_exceeded) when its turn does not come within `within_s` seconds.
        """
        turn = self._turns.setdefault(model, asyncio.Lock())
        try:
            async with asyncio.timeout(within_s):
                await turn.acquire()
        except TimeoutError as error:
            raise PrismError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"a request to {model!r} was lost twice, and others like it took until its deadline",
                retry=True,
            ) from error
        held = True

        def let_others() -> None:
            nonlocal held
            if held:
                held = False
                turn.release()

        try:
            yield let_others
        finally:
            let_others()
