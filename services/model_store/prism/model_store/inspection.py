"""Keeping the facts of all registered models current: specs in, facts and tokenizers out."""

import asyncio
import logging
from pathlib import Path

import msgspec
import nats.errors
import nats.js.errors

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.models import ModelFacts, ModelSpec
from prism.common.mirror import BucketMirror
from prism.common.telemetry import about
from prism.model_store.checkpoint import read_checkpoint
from prism.model_store.facts import facts_of
from prism.model_store.file_errors import reading
from prism.model_store.fingerprint import Identity
from prism.model_store.model_folder import is_hub_id
from prism.model_store.registering import FactsRegistry
from prism.model_store.store import ModelStore
from prism.model_store.tokenizer_bundle import bundle_key, read_bundle

log = logging.getLogger(__name__)

RECHECK_S = 15.0
READ_ATTEMPTS = 3
HUB_RETRY_S = 300.0
AT_ONCE = 4
BUS_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError)


class Inspector:
    """Writes the facts of each model whose spec changes, and looks again every RECHECK_S seconds: folders
    appear and change without telling. Whose facts stand is for `registering` to say.

    Each model is looked at by a task of its own, since a look at one of the hub's can take hours.
    """

    def __init__(self, bus: Bus, store: ModelStore) -> None:
        self._bus = bus
        self._store = store
        self._registry = FactsRegistry(bus, store.node)
        self._asked_for: set[str] = set()
        self._changed = asyncio.Event()
        self._pending: set[str] = set()
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._hub_retry_at: dict[str, float] = {}
        self._bundles: dict[tuple[str, str], str] = {}
        self._look_at_all = False

    def on_change(self, key: str, spec: ModelSpec | None) -> None:
        """To be called with each change of a spec in `prism_models`."""
        self._pending.add(key)
        if spec is not None:
            self._hub_retry_at.pop(spec.model_name, None)
        if key in self._looking:
            # It looks at what is not asked for any more.
            self._looking[key].cancel()
        self._changed.set()

    def look_again(self, model: str) -> None:
        """Look at `model` now: somebody expected another version of it than is in its folder."""
        self._asked_for.add(subjects.spec_key(model))
        self._changed.set()

    def facts_changed(self, key: str, facts: ModelFacts | None) -> None:
        """To be called with each change of facts in `prism_models`, whoever made it."""
        if self._registry.changed(key, facts):
            self._asked_for.add(f"spec.{key.partition('.')[2]}")
            self._changed.set()

    def bus_returned(self) -> None:
        """The bus was away, and may have lost what was written: look at everything anew."""
        self._registry.bus_returned()
        self._bundles.clear()
        self._look_at_all = True
        self._changed.set()

    async def run(self, specs: BucketMirror[ModelSpec]) -> None:
        """Inspect until cancelled."""
        self._pending.update(specs.values)
        clock = asyncio.get_running_loop().time
        look_at_all_at = clock() + RECHECK_S
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                self._pending |= self._asked_for & specs.values.keys()
                self._asked_for.clear()
                for key in sorted(self._pending - self._looking.keys()):
                    self._pending.discard(key)
                    look = self._look(key, specs.values.get(key))
                    self._looking[key] = task = tasks.create_task(look, name=f"look at {key}")
                    task.add_done_callback(lambda _, key=key: self._looked(key))  # type: ignore[misc]
                try:
                    async with asyncio.timeout_at(look_at_all_at):
                        await self._changed.wait()
                except TimeoutError:
                    self._look_at_all = True
                if self._look_at_all:
                    self._look_at_all = False
                    look_at_all_at = clock() + RECHECK_S
                    self._pending.update(specs.values.keys() - self._looking.keys())

    def _looked(self, key: str) -> None:
        del self._looking[key]
        if key in self._pending:
            self._changed.set()

    async def look_now(self, spec: ModelSpec) -> ModelFacts:
        """The facts of a model as they stand in the registry now that its folder was looked at afresh.

        Raises PrismError(store_unavailable) when the bus is away.
        """
        self._hub_retry_at.pop(spec.model_name, None)
        self._store.forget_folder(spec.model_path)
        key = subjects.facts_key(spec.model_name)
        try:
            async with self._lock(key):
                self._hub_retry_at.pop(spec.model_name, None)
                facts = await self.inspect(spec)
                assert facts is not None
                return await self._registry.register(key, facts, again=True)
        except BUS_ERRORS as error:
            raise PrismError(
                ErrorCode.STORE_UNAVAILABLE, f"facts of {spec.model_name} not written: {error}", retry=True
            ) from error

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def _look(self, key: str, spec: ModelSpec | None) -> None:
        facts_key = f"facts.{key.partition('.')[2]}"
        try:
            async with self._lock(facts_key):
                if spec is None:
                    await self._registry.forget(facts_key)
                elif (facts := await self.inspect(spec)) is not None:
                    await self._registry.register(facts_key, facts)
        except BUS_ERRORS as error:
            log.info("facts under %s not written, the bus is away: %s", key, error)

    async def inspect(self, spec: ModelSpec) -> ModelFacts | None:
        """The facts of a model, its tokenizer in the object store; None if it is not time to look again.

        Raises only errors of the bus: what reads files has their OSErrors be the model's failure.
        """
        now = asyncio.get_running_loop().time()
        if self._hub_retry_at.get(spec.model_name, now) > now:
            return None
        try:
            # Either may have to be fetched first, which keeps nobody else from being looked at.
            folder = await self._store.folder(spec.model_path)
            tokenizer_folder = await self._store.folder(spec.tokenizer_path or spec.model_path)
            async with self._slots:
                return await self._read(spec, folder, tokenizer_folder)
        except PrismError as error:
            if is_hub_id(spec.model_path) or is_hub_id(spec.tokenizer_path or "."):
                self._hub_retry_at[spec.model_name] = now + HUB_RETRY_S
            return ModelFacts(model=spec.model_name, error=error.message, node=self._store.node)
        except BUS_ERRORS:
            raise
        except Exception as error:
            log.exception("inspection failed", extra=about(model=spec.model_name))
            reason = f"{spec.model_path} could not be inspected: {error!r}"
            return ModelFacts(model=spec.model_name, error=reason, node=self._store.node)

    async def _read(self, spec: ModelSpec, folder: Path, tokenizer_folder: Path) -> ModelFacts:
        for _ in range(READ_ATTEMPTS):
            identity = await self._store.identity(spec.model_path)
            tokenizer = await self._store_tokenizer(tokenizer_folder)
            known = self._registry.found(subjects.facts_key(spec.model_name))
            if known and (known.fingerprint, known.tokenizer) == (identity.fingerprint, tokenizer):
                return known
            facts = await asyncio.to_thread(_facts_in, folder, spec.model_name, identity, tokenizer)
            # A folder that was exchanged meanwhile would have given a bit of both.
            if await self._store.identity(spec.model_path) == identity:
                return msgspec.structs.replace(facts, node=self._store.node)
        raise PrismError(
            ErrorCode.MODEL_FAILED, f"{folder} changes while it is read; it is looked at again", retry=True
        )

    async def _store_tokenizer(self, folder: Path) -> str:
        signature = await asyncio.to_thread(_tokenizer_signature, folder)
        known = self._bundles.get((str(folder), signature))
        if known is not None:
            return known
        bundle = await asyncio.to_thread(read_bundle, folder)
        key, payload = bundle_key(bundle)
        objects = await self._bus.objects(subjects.OBJECTS_TOKENIZERS)
        try:
            await objects.get_info(key)
        except nats.js.errors.NotFoundError:
            await objects.put(key, payload)
        self._bundles[str(folder), signature] = key
        return key


def _facts_in(folder: Path, model: str, identity: Identity, tokenizer: str) -> ModelFacts:
    return facts_of(model, read_checkpoint(folder), identity, tokenizer)


def _tokenizer_signature(folder: Path) -> str:
    with reading(folder):
        return repr(
            sorted(
                (path.name, path.stat().st_size, path.stat().st_mtime_ns)
                for path in folder.iterdir()
                if path.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges"))
            )
        )
