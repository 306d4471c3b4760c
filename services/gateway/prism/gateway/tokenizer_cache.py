"""Tokenizers from the object store, loaded once each and off the event loop."""

import asyncio
from collections import OrderedDict

import nats.errors
import nats.js.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode
from prism.common.messages.models import TokenizerBundle
from prism.common.tasks import end_task
from prism.gateway.text_tokenizer import TextTokenizer

FETCH_DEADLINE_S = 20.0
CAPACITY = 256


class TokenizerCache:
    """By key of the bundle, the least recently used ones dropped beyond CAPACITY. Use as `async with`: its
    end ends what is still being fetched."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._loaded: OrderedDict[str, TextTokenizer] = OrderedDict()
        self._loading: dict[str, asyncio.Task[TextTokenizer]] = {}

    async def __aenter__(self) -> "TokenizerCache":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._loading.values()):
            await end_task(task)

    async def get(self, key: str) -> TextTokenizer:
        """The tokenizer of `key`. Many may ask at once: it is fetched once, and if that fails, it fails for
        all of them; whoever asks later has it tried again. One who is cancelled leaves it to the others.

        Raises PrismError: store_unavailable when it is not in the object store (yet) or the store does not
        answer, model_failed when it cannot be read.
        """
        if (tokenizer := self._lookup(key)) is not None:
            return tokenizer
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._load(key), name=f"tokenizer {key}")
            task.add_done_callback(_seen)
        return await asyncio.shield(task)

    async def _load(self, key: str) -> TextTokenizer:
        try:
            bundle = await self._fetch(key)
            tokenizer = await asyncio.to_thread(TextTokenizer, bundle)
        finally:
            del self._loading[key]
        self._loaded[key] = tokenizer
        if len(self._loaded) > CAPACITY:
            self._loaded.popitem(last=False)
        return tokenizer

    def _lookup(self, key: str) -> TextTokenizer | None:
        tokenizer = self._loaded.get(key)
        if tokenizer is not None:
            self._loaded.move_to_end(key)
        return tokenizer

    async def _fetch(self, key: str) -> TokenizerBundle:
        try:
            async with asyncio.timeout(FETCH_DEADLINE_S):
                store = await self._bus.objects(subjects.OBJECTS_TOKENIZERS)
                found = await store.get(key)
        except nats.js.errors.NotFoundError as error:
            raise PrismError(
                ErrorCode.STORE_UNAVAILABLE,
                f"tokenizer {key!r} is not in the object store yet; is a model store running?",
                retry=True,
            ) from error
        except (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError) as error:
            raise PrismError(
                ErrorCode.STORE_UNAVAILABLE, f"tokenizer {key!r} could not be fetched: {error}", retry=True
            ) from error
        return decode(found.data or b"", TokenizerBundle)


def _seen(task: asyncio.Task[TextTokenizer]) -> None:
    """A failure is for those who wait; there may be none left."""
    if not task.cancelled():
        task.exception()
