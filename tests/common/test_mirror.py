"""Mirrors of KV buckets: complete when they say so."""

import pytest
from nats.js.kv import KeyValue

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.codec import encode
from prism.common.messages.models import ModelSpec
from prism.common.mirror import mirror_bucket

pytestmark = pytest.mark.core


async def test_a_mark_of_the_end_that_overtakes_the_entries_does_not_make_a_mirror_complete(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    await bucket.put("spec.a", encode(ModelSpec("a", "/a")))
    watch = KeyValue.watch

    async def watch_with_an_early_mark(self: KeyValue, keys: str) -> KeyValue.KeyWatcher:
        watcher = await watch(self, keys)
        watcher._updates._queue.appendleft(None)
        return watcher

    monkeypatch.setattr(KeyValue, "watch", watch_with_an_early_mark)
    async with mirror_bucket(bus, subjects.BUCKET_MODELS, ModelSpec, pattern="spec.*") as mirror:
        assert list(mirror.values) == ["spec.a"]
    async with mirror_bucket(bus, subjects.BUCKET_MODELS, ModelSpec, pattern="none.*") as mirror:
        assert mirror.values == {}
