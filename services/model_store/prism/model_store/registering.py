"""Whose facts of a model stand in the registry, where several stores look at folders of the same name.

Each store decides for itself, from what stands there and what it found. What another node's store found
stands for as long as that one is there to say that it has changed: a store that starts, or comes back to the
bus, has nothing new to tell.
"""

import asyncio
import logging

import nats.errors
import nats.js.errors
from nats.js.kv import KeyValue

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.models import ModelFacts
from prism.common.messages.store import StoreModelRequest, StoreReport
from prism.common.telemetry import about

log = logging.getLogger(__name__)

OTHER_STORE_S = 2.0
GONE_S = 10.0
"""A store that has said nothing for so long, asked at least twice, is gone."""
ASKED_AGAIN_S = 60.0
"""Silence counts from the first of questions that lie no further apart."""
WRITE_ATTEMPTS = 5


def says_the_same(one: ModelFacts, other: ModelFacts) -> bool:
    """Whether both say the same of the model, whichever node's files they were read from."""
    return content_of(one) == content_of(other) and one.error == other.error


def content_of(facts: ModelFacts) -> tuple[str, str]:
    """What tells one state of a folder from another: the version of the weights, and the tokenizer."""
    return facts.version, facts.tokenizer


def replaces(present: ModelFacts | None, found: ModelFacts, *, came_now: bool, finder_gone: bool) -> bool:
    """Whether what a store found takes the place of what is registered.

    `came_now`: this store has seen another content in the folder before. `finder_gone`: nothing is heard any
    more of the store that found what is registered.
    """
    if present is None:
        return True
    if present == found:
        return False
    # A store of an older release names no node, and no version either.
    own = present.node in ("", found.node)
    if found.error is not None:
        return own
    if present.error is not None:
        return True
    if own:
        return True
    return not says_the_same(present, found) and (came_now or finder_gone)


class FactsRegistry:
    """The facts in the bucket `prism_models` as the store of `node` writes them, by their keys."""

    def __init__(self, bus: Bus, node: str) -> None:
        self._bus = bus
        self._node = node
        # What was found here last, what of that could be read, and what stood in the registry then; settled
        # is what need not be compared until one of them changes.
        self._found: dict[str, ModelFacts] = {}
        self._contents: dict[str, tuple[str, str]] = {}
        self._stood: dict[str, ModelFacts] = {}
        self._settled: set[str] = set()
        self._silent: dict[str, tuple[float, float]] = {}

    def found(self, key: str) -> ModelFacts | None:
        """What was registered last, whether or not it stands."""
        return self._found.get(key)

    def changed(self, key: str, facts: ModelFacts | None) -> bool:
        """To be called with each change in the bucket, whoever made it. Whether to look at the model now."""
        if facts is not None and facts == self._stood.get(key):
            return False
        self._settled.discard(key)
        return facts is None or facts.error is not None

    def bus_returned(self) -> None:
        """The bus was away: it may have lost what was written, and nobody could be heard."""
        self._settled.clear()
        self._silent.clear()

    async def forget(self, key: str) -> None:
        """Take a model's facts out: it is not registered any more."""
        self._settled.discard(key)
        for known in (self._found, self._contents, self._stood):
            known.pop(key, None)
        bucket = await self._bus.bucket(subjects.BUCKET_MODELS)
        await bucket.delete(key)

    async def register(self, key: str, facts: ModelFacts, *, again: bool = False) -> ModelFacts:
        """Have `facts` stand in the registry, unless better ones do. Those that stand there now; what was
        settled before is looked up only if asked to do so `again`."""
        if key in self._settled and self._found.get(key) == facts and not again:
            return facts
        came_now = self._contents.get(key, content_of(facts)) != content_of(facts)
        bucket = await self._bus.bucket(subjects.BUCKET_MODELS)
        for _ in range(WRITE_ATTEMPTS):
            present, revision = await self._present(bucket, key)
            # A bus that lost its state may not know what this store does.
            stood = present or self._stood.get(key)
            finder_gone = stood is not None and not came_now and await self._is_gone(stood, facts)
            mine = replaces(stood, facts, came_now=came_now, finder_gone=finder_gone)
            stands = facts if mine or stood is None else stood
            try:
                if stands != present:
                    await _put(bucket, key, stands, revision)
            except nats.js.errors.KeyWrongLastSequenceError:
                # Somebody was faster: that is to be weighed, too.
                continue
            self._tell(key, facts, stands, changed=stands != present)
            self._stood[key] = stands
            self._found[key] = facts
            if facts.error is None:
                self._contents[key] = content_of(facts)
            if facts.error is not None or says_the_same(stands, facts):
                self._settled.add(key)
            return stands
        raise nats.js.errors.KeyWrongLastSequenceError

    async def _present(self, bucket: KeyValue, key: str) -> tuple[ModelFacts | None, int | None]:
        """What stands in the registry, None for nothing that can be read, and its revision."""
        try:
            entry = await bucket.get(key)
        except nats.js.errors.KeyNotFoundError:
            return None, None
        try:
            return decode(entry.value or b"", ModelFacts), entry.revision
        except PrismError:
            return None, entry.revision

    def _tell(self, key: str, found: ModelFacts, stands: ModelFacts, *, changed: bool) -> None:
        names = about(model=found.model)
        if stands == found and changed:
            if found.error is not None:
                log.error(
                    "cannot be served: %s; mend it, then `prism models retry`", found.error, extra=names
                )
            else:
                what = f"{found.architecture}, {found.parameters} parameters"
                log.info("in order: %s", what, extra=names)
        elif stands != found and self._found.get(key) != found:
            if found.error is not None:
                log.warning("%s; the facts that another store found stay", found.error, extra=names)
            elif not says_the_same(stands, found):
                log.warning(
                    "the folder here holds another version than that of node %s, which is registered: "
                    "nothing of it starts here; give this node the same files",
                    stands.node,
                    extra=names,
                )

    async def _is_gone(self, present: ModelFacts, found: ModelFacts) -> bool:
        """Whether the store that found what is registered has been silent for GONE_S, if that matters."""
        node = present.node
        if node in ("", self._node) or present.error or found.error or says_the_same(present, found):
            return False
        now = asyncio.get_running_loop().time()
        try:
            await self._bus.request(
                subjects.store(node, "list"), StoreModelRequest(""), StoreReport, timeout_s=OTHER_STORE_S
            )
        except (PrismError, nats.errors.Error, OSError, TimeoutError):
            since, asked = self._silent.get(node, (now, now))
            since = since if now - asked < ASKED_AGAIN_S else now
            self._silent[node] = since, now
            return now - since >= GONE_S
        self._silent.pop(node, None)
        return False


async def _put(bucket: KeyValue, key: str, facts: ModelFacts, revision: int | None) -> None:
    """Raises KeyWrongLastSequenceError where somebody else has written since."""
    if revision is None:
        await bucket.create(key, encode(facts))
    else:
        await bucket.update(key, encode(facts), last=revision)
