"""Room in memory for images that engines are about to make, so that no host holds more than its store may."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator

from prism.common.errors import PrismError
from prism.model_store.images import ImageKey, ImageTable

# Until a lease that its engine has closed has ended here as well; until others have built an engine from the
# same checkpoint.
PATIENCE_S = 1.0
SHARED_CHECKPOINT_PATIENCE_S = 60.0
POLL_S = 0.02


class Rooms:
    """The rooms that are kept in a table of images. Belongs to the table's event loop."""

    def __init__(self, table: ImageTable) -> None:
        self._table = table
        self._kept: dict[str, contextlib.ExitStack] = {}

    @contextlib.asynccontextmanager
    async def keep(self, model: str, key: ImageKey, nbytes: int) -> AsyncIterator[str]:
        """Keep room within the `async with` for the image of an engine of `model`; yields the room's name.
        Raises PrismError(out_of_memory)."""
        began = time.monotonic()
        what = f"the engine image of {model}"
        with contextlib.ExitStack() as kept:
            while True:
                needed = 0 if self._table.get(key) else nbytes
                try:
                    kept.enter_context(self._table.reserve(needed, what, in_place_of=key.fingerprint))
                    break
                except PrismError:
                    if time.monotonic() > began + self._patience_s(key.fingerprint):
                        raise
                await asyncio.sleep(POLL_S)
            name = secrets.token_hex(8)
            self._kept[name] = kept
            try:
                yield name
            finally:
                self._kept.pop(name, None)

    def _patience_s(self, fingerprint: str) -> float:
        checkpoint = self._table.get(ImageKey(fingerprint, ""))
        shared = checkpoint is not None and checkpoint.leases
        return SHARED_CHECKPOINT_PATIENCE_S if shared else PATIENCE_S

    def vacated(self, name: str) -> contextlib.ExitStack | None:
        """What ends with the room `name`, whose bytes count no longer; None where there is no such room."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            kept.close()
        return kept
