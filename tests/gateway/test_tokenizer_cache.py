"""However many wait for a tokenizer, it is fetched once, and all get what comes of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nats.js.object_store import ObjectStore
from tests.gateway.conftest import MakeStage

from prism.common import subjects
from prism.common.bus import Bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import encode
from prism.common.messages.models import TokenizerBundle
from prism.gateway.settings import Settings
from prism.gateway.text_tokenizer import TextTokenizer
from prism.gateway.tokenizer_cache import TokenizerCache

pytestmark = pytest.mark.core

WAITERS = 100


class Door:
    """Before the bus's object stores: who asks waits until it is `open`."""

    def __init__(self, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = asyncio.Event()
        self.asked = 0
        self.reached = asyncio.Event()
        self.left = asyncio.Event()
        behind = bus.objects

        async def objects(name: str) -> ObjectStore:
            self.asked += 1
            self.reached.set()
            try:
                await self.open.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise
            return await behind(name)

        monkeypatch.setattr(bus, "objects", objects)


@pytest.fixture
async def door(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> Door:
    await bus.objects(subjects.OBJECTS_TOKENIZERS)
    return Door(bus, monkeypatch)


async def put(bus: Bus, key: str, bundle: TokenizerBundle) -> None:
    store = await bus.jetstream.object_store(subjects.OBJECTS_TOKENIZERS)
    await store.put(key, encode(bundle))


@asynccontextmanager
async def waiting(
    cache: TokenizerCache, door: Door, count: int = WAITERS
) -> AsyncIterator[list[asyncio.Task[TextTokenizer]]]:
    """So many who wait for the tokenizer `key`, all of them before the door is asked for it."""
    tasks = [asyncio.create_task(cache.get("key")) for _ in range(count)]
    try:
        await door.reached.wait()
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_all_who_wait_get_the_failure_of_the_one_fetch_and_later_ones_try_again(
    bus: Bus, door: Door, bundle: TokenizerBundle
) -> None:
    async with TokenizerCache(bus) as cache, asyncio.timeout(10):
        async with waiting(cache, door) as tasks:
            assert door.asked == 1
            door.open.set()
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(answer, PrismError)
                assert (answer.code, answer.retry) == (ErrorCode.STORE_UNAVAILABLE, True)
        assert door.asked == 1
        await put(bus, "key", bundle)
        tokenizer = await cache.get("key")
        assert door.asked == 2
        assert await cache.get("key") is tokenizer
        assert door.asked == 2


async def test_one_who_leaves_takes_nothing_from_the_others(
    bus: Bus, door: Door, bundle: TokenizerBundle
) -> None:
    await put(bus, "key", bundle)
    async with TokenizerCache(bus) as cache, asyncio.timeout(10), waiting(cache, door) as (first, *others):
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        door.open.set()
        assert len({id(await other) for other in others}) == 1
        assert door.asked == 1


async def test_a_failure_that_nobody_waits_for_any_more_is_nobodys(
    bus: Bus, door: Door, bundle: TokenizerBundle
) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with TokenizerCache(bus) as cache, asyncio.timeout(10):
        async with waiting(cache, door, 2):
            pass
        door.open.set()
        with pytest.raises(PrismError):
            await cache.get("other")
        with pytest.raises(PrismError):
            await cache.get("key")
    assert complaints == []


async def test_no_fetch_outlives_the_cache(bus: Bus, door: Door) -> None:
    async with asyncio.timeout(10):
        async with TokenizerCache(bus) as cache, waiting(cache, door, 1):
            pass
        assert door.left.is_set()


async def test_the_wait_for_a_tokenizer_counts_to_a_requests_deadline(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await make_stage(Settings(deadline_s=0.5))
    await stage.register("m")
    Door(stage.gateway._bus, monkeypatch)
    async with asyncio.timeout(10):
        answers = await asyncio.gather(
            *(stage.http.post("/v1/completions", json={"model": "m", "prompt": "hello"}) for _ in range(20))
        )
    for answer in answers:
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        error = answer.json()["error"]
        assert error["code"] == "deadline_exceeded"
        assert "tokenizer of 'm'" in error["message"]
