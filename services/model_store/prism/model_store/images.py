"""The images in memory: found by what they are of, held once for equal content, evicted under a budget."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.store import ImageKind, ImageManifest
from prism.model_store.eviction import HeldImage, choose_victims


class ImageKey(NamedTuple):
    """What an image is of: a model's fingerprint and an engine's layout, '' for the checkpoint."""

    fingerprint: str
    layout: str


@dataclass
class Entry:
    """One thing that an image's bytes are: its manifest, and the models that asked for it."""

    manifest: ImageManifest
    models: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Image:
    """Bytes in a memfd. `users` counts leases and the writing to disk; with any, the image stays."""

    number: int
    kind: ImageKind
    nbytes: int
    content_hash: str
    fd: int
    last_used: float
    users: int = 0
    leases: int = 0
    entries: dict[ImageKey, Entry] = field(default_factory=dict)

    @property
    def models(self) -> set[str]:
        """All that asked for it, under any key."""
        return set().union(*(entry.models for entry in self.entries.values()))


class ImageTable:
    """All images of a store. Belongs to one event loop: nothing here waits.

    The memory of leased images that lost their entries counts until the last lease ends. `on_evicted` is
    called with each image that leaves, and the models that asked for it.
    """

    def __init__(self, budget_bytes: int, on_evicted: Callable[[Image, set[str]], None]) -> None:
        self.budget_bytes = budget_bytes
        self._on_evicted = on_evicted
        self._images: dict[int, Image] = {}
        self._by_key: dict[ImageKey, Image] = {}
        self._reserved = 0
        self._next_number = 0

    @property
    def images(self) -> list[Image]:
        """All images held, oldest first."""
        return list(self._images.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of all images held, and of those being staged."""
        return self._reserved + sum(image.nbytes for image in self._images.values())

    def get(self, key: ImageKey) -> Image | None:
        """The image under `key`, if it is in memory."""
        return self._by_key.get(key)

    @property
    def keys_in_use(self) -> frozenset[ImageKey]:
        """What leased images, and those being written to disk, are of."""
        return frozenset(key for image in self._images.values() if image.users for key in image.entries)

    def engine_layouts(self, fingerprint: str) -> list[str]:
        """Layouts in which a model is in memory, the last used first."""
        found = [key for key in self._by_key if key.fingerprint == fingerprint and key.layout]
        found.sort(key=lambda key: self._by_key[key].last_used, reverse=True)
        return [key.layout for key in found]

    def equal_to(self, manifest: ImageManifest) -> Image | None:
        """The image in memory that has the content of `manifest`, if there is one."""
        wanted = (manifest.content_hash, manifest.kind, manifest.nbytes)
        for image in self._images.values():
            if (image.content_hash, image.kind, image.nbytes) == wanted:
                return image
        return None

    def add(self, manifest: ImageManifest, fd: int, model: str) -> Image:
        """Hold the image in `fd`, which becomes the table's. When equal content is held already, `fd` is
        closed and the new manifest points to the held bytes."""
        key = ImageKey(manifest.fingerprint, manifest.layout)
        entry = Entry(manifest, {model})
        image = self.equal_to(manifest)
        if image is None:
            image = Image(
                self._next_number, manifest.kind, manifest.nbytes, manifest.content_hash, fd, time.monotonic()
            )
            self._next_number += 1
            self._images[image.number] = image
        else:
            os.close(fd)
            image.last_used = time.monotonic()
        before = self._by_key.get(key)
        if before is image:
            entry.models |= image.entries[key].models
        elif before is not None:
            self._drop_key(key)
        image.entries[key] = entry
        self._by_key[key] = image
        return image

    @contextlib.contextmanager
    def use(self, image: Image, *, lease: bool = False) -> Iterator[None]:
        """Keep `image` in memory for the length of the `with`."""
        image.users += 1
        image.leases += lease
        image.last_used = time.monotonic()
        try:
            yield
        finally:
            image.users -= 1
            image.leases -= lease
            image.last_used = time.monotonic()
            self._free_if_orphaned(image)

    @contextlib.contextmanager
    def reserve(self, nbytes: int, what: str, *, in_place_of: str = "") -> Iterator[None]:
        """Make room for an image that is about to be made. Within the `with` its bytes count as used. It
        supersedes the checkpoint of the fingerprint `in_place_of`.

        Raises PrismError(out_of_memory, retry) when evicting all idle images would not be enough.
        """
        free = self.budget_bytes - self.used_bytes
        victims = choose_victims(self._snapshot(in_place_of), free, nbytes)
        if victims is None:
            leased = sum(image.nbytes for image in self._images.values() if image.users)
            raise PrismError(
                ErrorCode.OUT_OF_MEMORY,
                f"{what} needs {_gb(nbytes)} of the store's {_gb(self.budget_bytes)}, of which leases hold "
                f"{_gb(leased)} and staging under way {_gb(self._reserved)}; "
                "raise PRISM_STORE_MEMORY_GB, or let models go",
                retry=True,
            )
        for number in victims:
            self._evict(self._images[number])
        self._reserved += nbytes
        try:
            yield
        finally:
            self._reserved -= nbytes

    def drop_model(self, model: str) -> tuple[int, int]:
        """Forget what `model` asked for. Returns the bytes freed, and those that leases still hold."""
        freed = held = 0
        for image in self.images:
            mine = [key for key, entry in image.entries.items() if model in entry.models]
            if not mine:
                continue
            if image.users:
                held += image.nbytes
                continue
            for key in mine:
                image.entries[key].models.discard(model)
                if not image.entries[key].models:
                    self._drop_key(key)
            if not image.entries:
                freed += image.nbytes
                self._on_evicted(image, {model})
        return freed, held

    def close(self) -> None:
        """Let go of all images. Leases that others hold keep their memory until they end."""
        for image in self.images:
            os.close(image.fd)
        self._images.clear()
        self._by_key.clear()

    def _snapshot(self, in_place_of: str) -> list[HeldImage]:
        in_engine_layout = {key.fingerprint for key in self._by_key if key.layout} | {in_place_of}
        return [
            HeldImage(
                key=image.number,
                nbytes=image.nbytes,
                busy=image.users > 0,
                superseded=image.kind is ImageKind.CHECKPOINT
                and all(key.fingerprint in in_engine_layout for key in image.entries),
                last_used=image.last_used,
            )
            for image in self._images.values()
        ]

    def _evict(self, image: Image) -> None:
        self._on_evicted(image, image.models)
        for key in list(image.entries):
            self._drop_key(key)

    def _drop_key(self, key: ImageKey) -> None:
        image = self._by_key.pop(key)
        del image.entries[key]
        self._free_if_orphaned(image)

    def _free_if_orphaned(self, image: Image) -> None:
        if not image.entries and not image.users and image.number in self._images:
            del self._images[image.number]
            os.close(image.fd)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
