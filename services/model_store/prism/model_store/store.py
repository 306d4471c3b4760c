"""The model store proper: makes images, lends them, takes new ones in, keeps them on disk.

Everything here runs in one event loop; what blocks (reading, hashing, writing) runs in threads that the
awaiting coroutine outlives.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import create_memfd, mapped, seal_size
from prism.common.messages.events import Event
from prism.common.messages.models import same_version
from prism.common.messages.store import ImageKind, ImageManifest, StagedImage, StoreReport
from prism.common.telemetry import about
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.content_hash import hash_of_image
from prism.model_store.fingerprint import Identity, Signature, identity_of, signature_of
from prism.model_store.flights import Flight, Flights, OnProgress
from prism.model_store.image_disk import ImageDisk
from prism.model_store.image_files import FINGERPRINT
from prism.model_store.images import Image, ImageKey, ImageTable
from prism.model_store.model_folder import is_folder, resolve_folder
from prism.model_store.rooms import Rooms
from prism.model_store.staging import ImagePlan, ReadProgress, plan_checkpoint_image, read_image

log = logging.getLogger(__name__)
T = TypeVar("T")

PROGRESS_PERIOD_S = 0.25
WRITE_DEADLINE_S = 60.0


@dataclass(frozen=True)
class LentImage:
    """An image on loan. `seconds`: time spent staging it, 0 if it was there."""

    image: Image
    manifest: ImageManifest
    seconds: float


class ModelStore:
    """Staged weights of one node. Use as `async with`: at its end, staging is cancelled and what is being
    written to disk gets WRITE_DEADLINE_S seconds."""

    def __init__(
        self,
        *,
        node: str,
        source: str,
        image_dir: Path,
        budget_bytes: int,
        disk_bytes: int | None,
        threads: int,
        tell: Callable[[Event], None],
    ) -> None:
        self.node = node
        self.table = ImageTable(budget_bytes, self._on_evicted)
        self.rooms = Rooms(self.table)
        self.disk = ImageDisk(image_dir, disk_bytes)
        self._source = source
        self._threads = threads
        self._tell = tell
        self.on_other_version: Callable[[str], None] = lambda model: None
        self._flights = Flights()
        self._folders: dict[str, Path] = {}
        self._identities: dict[Path, tuple[Signature, Identity]] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self._on_disk: set[ImageKey] = set()

    async def __aenter__(self) -> "ModelStore":
        await asyncio.to_thread(self.disk.clean)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        async with self._flights:
            pass
        if self._writes:
            log.info("writing %d images to disk before the end", len(self._writes))
            late = (await asyncio.wait(self._writes, timeout=WRITE_DEADLINE_S))[1]
            for task in late:
                log.error("%s was not done after %.0f s and is given up", task.get_name(), WRITE_DEADLINE_S)
                task.cancel()
        self.table.close()

    @contextlib.asynccontextmanager
    async def lend(
        self, model: str, model_path: str, layout: str, on_progress: OnProgress, version: str = ""
    ) -> AsyncIterator[LentImage]:
        """Lend the image of `model` in `layout`, else its checkpoint, staged first if it is not in memory.

        The loan ends with the `async with`. Raises PrismError: model_failed, also (retry) where the files are
        not of the `version` asked for; out_of_memory.
        """
        began = time.monotonic()
        waited = False
        while True:
            fingerprint = await self._fingerprint(model, model_path, version)
            key = ImageKey(fingerprint, layout)
            if layout and self.table.get(key) is None and await self._load_from_disk(key, model, on_progress):
                waited = True
            image = self.table.get(key)
            if image is None:
                key = ImageKey(fingerprint, "")
                image = self.table.get(key)
            if image is not None:
                break
            # Once around again: between the end of a staging and this line the image may be gone.
            await self._stage_checkpoint(key, model, model_path, on_progress)
            waited = True
        entry = image.entries[key]
        entry.models.add(model)
        with self.table.use(image, lease=True):
            if key in self._on_disk:
                await _in_thread(lambda: self.disk.touch(key))
            yield LentImage(image, entry.manifest, time.monotonic() - began if waited else 0.0)

    async def prefetch(self, model: str, model_path: str) -> int:
        """Bring `model` into memory, in an engine's layout if there is one. Returns its bytes."""
        fingerprint = (await self.identity(model_path)).fingerprint
        layouts = self.table.engine_layouts(fingerprint)
        layouts += await asyncio.to_thread(self.disk.layouts, fingerprint)
        async with self.lend(model, model_path, layouts[0] if layouts else "", lambda *_: None) as lent:
            return lent.image.nbytes

    async def deposit(self, model: str, manifest: ImageManifest, fd: int, room: str = "") -> str:
        """Take in an image in an engine's layout, in the `room` that was kept for it if it has one; `fd`
        becomes the store's. Returns the content hash.

        With no room in memory it goes to disk only. Raises PrismError: invalid_request, internal.
        """
        began = time.monotonic()
        with contextlib.ExitStack() as on_error:
            on_error.callback(os.close, fd)
            _check_deposit(manifest, fd)
            hashed = await _in_thread(lambda: _hash_memfd(fd, manifest.nbytes, self._threads))
            if manifest.content_hash not in ("", hashed):
                raise PrismError(
                    ErrorCode.INVALID_REQUEST, f"the image of {model} is not what its content hash says"
                )
            manifest = msgspec.structs.replace(manifest, content_hash=hashed)
            key = ImageKey(manifest.fingerprint, manifest.layout)
            try:
                kept = self.rooms.vacated(room)
                needed = 0 if self.table.equal_to(manifest) else manifest.nbytes
                with self.table.reserve(needed, f"the engine image of {model}"):
                    on_error.pop_all()
                    image = self.table.add(manifest, fd, model)
                if kept is not None:
                    # Whoever has the room has no lease yet.
                    kept.enter_context(self.table.use(image))
            except PrismError as error:
                if error.code is not ErrorCode.OUT_OF_MEMORY:
                    raise
                log.warning("the engine image goes to disk only: %s", error, extra=about(model=model))
                await self._put_on_disk(manifest, fd)
                return hashed
        self._on_disk.discard(key)
        write = asyncio.create_task(self._write(image, manifest), name=f"writing the image of {model}")
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        self._tell_staged(model, "engine image", image.nbytes, began)
        return hashed

    def evict(self, model: str) -> int:
        """Drop the images that only `model` asked for; returns the bytes freed.

        Raises PrismError(overloaded, retry) when leases hold all there is to free.
        """
        freed, held = self.table.drop_model(model)
        if held and not freed:
            raise PrismError(
                ErrorCode.OVERLOADED,
                f"{held / 1e9:.2f} GB of {model} are on lease to engines on {self.node}, "
                "or being written to disk; release the model first",
                retry=True,
            )
        return freed

    def report(self) -> StoreReport:
        """What is in memory now."""
        now = time.monotonic()
        return StoreReport(
            node=self.node,
            budget_bytes=self.table.budget_bytes,
            used_bytes=self.table.used_bytes,
            images=[
                StagedImage(
                    fingerprint=key.fingerprint,
                    kind=image.kind,
                    nbytes=image.nbytes,
                    models=sorted(image.models),
                    leases=image.leases,
                    idle_s=0.0 if image.users else now - image.last_used,
                    layout=key.layout,
                    on_disk=key in self._on_disk,
                )
                for image in self.table.images
                for key in list(image.entries)[:1]
            ],
        )

    async def folder(self, model_path: str) -> Path:
        """The folder that `resolve_folder` finds for `model_path`, remembered while it is there. Raises
        PrismError(model_failed)."""
        folder = self._folders.get(model_path)
        if folder is None or not await asyncio.to_thread(is_folder, folder):
            folder = self._folders[model_path] = await resolve_folder(model_path)
        return folder

    def forget_folder(self, model_path: str) -> None:
        """Look at `model_path` afresh when it is next asked for."""
        folder = self._folders.pop(model_path, None)
        if folder is not None:
            self._identities.pop(folder, None)

    async def identity(self, model_path: str) -> Identity:
        """What the model at `model_path` is, remembered while its files stay as they are."""
        folder = await self.folder(model_path)
        signature = await _in_thread(lambda: signature_of(folder))
        known = self._identities.get(folder)
        if known is None or known[0] != signature:
            identity = await _in_thread(lambda: identity_of(read_checkpoint(folder)))
            self._identities[folder] = known = (signature, identity)
        return known[1]

    async def _fingerprint(self, model: str, model_path: str, version: str) -> str:
        """Raises PrismError(model_failed, retry) where the model's files are of another version."""
        identity = await self.identity(model_path)
        if not same_version(version, identity.version):
            self.on_other_version(model)
            raise PrismError(
                ErrorCode.MODEL_FAILED,
                f"{await self.folder(model_path)} on node {self.node} holds another version of {model} than "
                "the one that is registered: its files have just changed, or another node's are others",
                retry=True,
            )
        return identity.fingerprint

    async def _load_from_disk(self, key: ImageKey, model: str, on_progress: OnProgress) -> bool:
        """Whether an image was read; a broken one is deleted, and the caller does without."""
        manifest = await _in_thread(lambda: self.disk.find(key))
        if manifest is None:
            return False

        async def make(flight: Flight) -> None:
            plan = self.disk.plan(key, manifest)
            try:
                fd, content_hash, reserved = await self._read(model, plan, flight, self.disk.kept(key))
            except PrismError as error:
                # One that could not be read this time may be whole.
                if error.code is ErrorCode.MODEL_FAILED and not isinstance(error.__cause__, OSError):
                    await _in_thread(partial(self.disk.delete, key, error.message))
                raise
            with reserved:
                if content_hash != manifest.content_hash:
                    why = f"its content hash is {content_hash} instead of {manifest.content_hash}"
                    await _in_thread(lambda: self.disk.delete(key, why))
                    raise PrismError(
                        ErrorCode.MODEL_FAILED, f"the image of {model} on disk is corrupt: {why}"
                    )
                self._on_disk.add(key)
                self.table.add(manifest, os.dup(fd), model)
            self._tell_staged(model, "engine image from disk", plan.nbytes, began)

        began = time.monotonic()
        try:
            await self._flights.join(key, make, on_progress)
        except PrismError as error:
            if error.code is not ErrorCode.MODEL_FAILED:
                raise
            log.info("%s; it is staged from its checkpoint", error, extra=about(model=model))
            self._tell(Event("staging", model, self._source, detail=error.message))
            return False
        return True

    async def _stage_checkpoint(
        self, key: ImageKey, model: str, model_path: str, on_progress: OnProgress
    ) -> None:
        async def make(flight: Flight) -> None:
            folder = await self.folder(model_path)
            checkpoint = await _in_thread(lambda: read_checkpoint(folder))
            plan = plan_checkpoint_image(checkpoint)
            fd, content_hash, reserved = await self._read(model, plan, flight)
            with reserved:
                if (await self.identity(model_path)).fingerprint != key.fingerprint:
                    raise PrismError(
                        ErrorCode.MODEL_FAILED, f"{folder} changed while it was staged; try again", retry=True
                    )
                manifest = ImageManifest(
                    fingerprint=key.fingerprint,
                    kind=ImageKind.CHECKPOINT,
                    nbytes=plan.nbytes,
                    tensors=plan.tensors,
                    content_hash=content_hash,
                )
                self.table.add(manifest, os.dup(fd), model)
            self._tell_staged(model, "checkpoint image", plan.nbytes, began)

        began = time.monotonic()
        await self._flights.join(key, make, on_progress)

    async def _read(
        self,
        model: str,
        plan: ImagePlan,
        flight: Flight,
        files_kept: contextlib.AbstractContextManager[None] | None = None,
    ) -> tuple[int, str, contextlib.ExitStack]:
        """The plan's image in a fresh memfd, its hash, and what ends its reservation and closes it. It is
        read within `files_kept`, in the thread that reads."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.table.reserve(plan.nbytes, model))
            fd = create_memfd("prism-image", plan.nbytes)
            stack.callback(os.close, fd)
            progress = ReadProgress(plan.nbytes)

            def read() -> str:
                with files_kept or contextlib.nullcontext():
                    return read_image(plan, fd, self._threads, progress)

            reading = asyncio.ensure_future(asyncio.to_thread(read))
            try:
                while not reading.done():
                    self._tell_progress(model, progress, flight)
                    await asyncio.wait({reading}, timeout=PROGRESS_PERIOD_S)
            finally:
                progress.cancelled.set()
                await asyncio.gather(reading, return_exceptions=True)
            content_hash = reading.result()
            self._tell_progress(model, progress, flight)
            seal_size(fd)
            return fd, content_hash, stack.pop_all()

    def _tell_staged(self, model: str, what: str, nbytes: int, began: float) -> None:
        seconds = time.monotonic() - began
        log.info("%s of %.2f GB staged in %.2f s", what, nbytes / 1e9, seconds, extra=about(model=model))
        self._tell(
            Event(
                "staged",
                model,
                self._source,
                detail=what,
                seconds={"stage": seconds},
                bytes={"total": nbytes},
            )
        )

    def _tell_progress(self, model: str, progress: ReadProgress, flight: Flight) -> None:
        done, total = progress.done_bytes, progress.total_bytes
        flight.tell(done, total)
        self._tell(Event("staging", model, self._source, bytes={"done": done, "total": total}))

    async def _write(self, image: Image, manifest: ImageManifest) -> None:
        with self.table.use(image):
            try:
                await self._put_on_disk(manifest, image.fd)
            except PrismError as error:
                log.error("%s", error, extra=about(model=",".join(sorted(image.models))))

    async def _put_on_disk(self, manifest: ImageManifest, fd: int) -> None:
        in_use = self.table.keys_in_use
        try:
            await _in_thread(lambda: self.disk.write(manifest, fd, in_use))
        finally:
            # Others may have made room for it.
            known = frozenset(self._on_disk)
            self._on_disk -= await _in_thread(lambda: {key for key in known if not self.disk.holds(key)})
        self._on_disk.add(ImageKey(manifest.fingerprint, manifest.layout))

    def _on_evicted(self, image: Image, models: set[str]) -> None:
        for model in sorted(models):
            self._tell(
                Event(
                    "evicted",
                    model,
                    self._source,
                    detail=f"{image.kind.value} image",
                    bytes={"total": image.nbytes},
                )
            )


def _check_deposit(manifest: ImageManifest, fd: int) -> None:
    seal_size(fd)
    problem = None
    if manifest.kind is not ImageKind.ENGINE or not manifest.layout:
        problem = "only images in an engine's layout, which has a name, are taken in"
    elif not FINGERPRINT.fullmatch(manifest.fingerprint):
        problem = f"its fingerprint {manifest.fingerprint!r} is not 32 hex digits"
    elif os.fstat(fd).st_size < manifest.nbytes:
        problem = f"its memory holds {os.fstat(fd).st_size} bytes, its manifest says {manifest.nbytes}"
    elif any(
        tensor.offset < 0 or tensor.nbytes < 0 or tensor.offset + tensor.nbytes > manifest.nbytes
        for tensor in manifest.tensors
    ):
        problem = "a tensor of its manifest ends beyond the image"
    if problem:
        raise PrismError(ErrorCode.INVALID_REQUEST, f"the store does not take this image: {problem}")


def _hash_memfd(fd: int, nbytes: int, threads: int) -> str:
    with mapped(fd, nbytes) as view:
        return hash_of_image(view, threads)


async def _in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread, and wait for its end even when cancelled: it may use what the caller owns."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.gather(running, return_exceptions=True)
        raise
