"""The arbiter: quotas follow demand within the ledger's limit, whatever engines take their time for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, cast

import pytest

from prism.common.errors import ErrorCode, PrismError
from prism.gpu_worker import quota_arbiter
from prism.gpu_worker.model_instance import ModelInstance
from prism.gpu_worker.quota_arbiter import QuotaArbiter
from prism.scheduling.ledger import MemoryLedger
from prism.scheduling.quotas import QuotaHolder

pytestmark = pytest.mark.core

LIMIT = 1000
DEADLINE_S = 10.0


class ScriptedInstance:
    """A model whose engine confirms a lowered quota when `confirm` is set."""

    def __init__(self, ledger: MemoryLedger, name: str, kv: int) -> None:
        self.name = name
        self.ledger = ledger
        self.wanted = 0
        self.committed = 0
        self.changing = False
        self.confirm = asyncio.Event()
        self.confirm.set()
        self.asked: list[int] = []
        self.was_asked = asyncio.Event()
        self.error: PrismError | None = None
        ledger.reserve(name, weights=100, kv=kv)

    @property
    def quota(self) -> int:
        return self.ledger.held(self.name).kv

    def quota_holder(self) -> QuotaHolder | None:
        if self.changing:
            return None
        return QuotaHolder(
            self.name,
            self.quota,
            committed_bytes=self.committed,
            wanted_bytes=max(self.wanted, self.committed),
            floor_bytes=50,
            cap_bytes=LIMIT,
        )

    async def set_quota(self, kv_bytes: int) -> bool:
        self.asked.append(kv_bytes)
        self.was_asked.set()
        if self.error is not None:
            raise self.error
        self.changing = True
        try:
            if kv_bytes < self.quota:
                await self.confirm.wait()
            self.ledger.resize(self.name, weights=100, kv=kv_bytes)
        finally:
            self.changing = False
        return True


class Rig:
    """Two models that share all there is, and their arbiter."""

    def __init__(self, tasks: asyncio.TaskGroup, *, moves: bool = True) -> None:
        self.ledger = MemoryLedger(LIMIT)
        self.hot = ScriptedInstance(self.ledger, "hot", 400)
        self.idle = ScriptedInstance(self.ledger, "idle", 400)

        def spawn(work: Coroutine[Any, Any, None], *, name: str) -> "asyncio.Task[None]":
            return tasks.create_task(work, name=name)

        self.changes = asyncio.Event()
        self.arbiter = QuotaArbiter(
            self.ledger,
            lambda: cast("list[ModelInstance]", [self.hot, self.idle]),
            spawn,
            on_changed=self.changes.set,
            moves=moves,
        )

    def want(self, nbytes: int) -> None:
        self.hot.wanted = nbytes
        self.arbiter.changed()

    async def until_changed(self) -> None:
        """Wait for the next quota that was set."""
        self.changes.clear()
        await asyncio.wait_for(self.changes.wait(), DEADLINE_S)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with asyncio.TaskGroup() as tasks:
        made = Rig(tasks)
        loop = tasks.create_task(made.arbiter.run(), name="arbiter")
        yield made
        made.idle.confirm.set()
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


async def test_demand_is_met_from_idle_memory_at_once(rig: Rig) -> None:
    rig.want(600)
    while rig.hot.quota < 600:
        await rig.until_changed()
    assert (rig.hot.quota, rig.idle.quota) == (600, 200)
    assert (rig.hot.asked, rig.idle.asked) == ([600], [200])


async def test_nobody_grows_before_the_other_has_confirmed(rig: Rig) -> None:
    rig.idle.confirm.clear()
    rig.want(700)
    await asyncio.wait_for(rig.idle.was_asked.wait(), DEADLINE_S)
    assert rig.hot.asked == []
    assert rig.ledger.reserved_bytes == LIMIT
    rig.idle.confirm.set()
    while rig.hot.quota < 700:
        await rig.until_changed()
        assert rig.ledger.reserved_bytes <= LIMIT
    assert rig.idle.asked == [100]


async def test_a_change_that_failed_is_tried_again(rig: Rig) -> None:
    rig.idle.error = PrismError(ErrorCode.ENGINE_LOST, "gone", retry=True)
    rig.want(600)
    await rig.until_changed()
    rig.idle.error = None
    while rig.hot.quota < 600:
        await rig.until_changed()
    assert rig.ledger.reserved_bytes <= LIMIT


async def test_an_activation_is_made_room_for_out_of_what_nobody_will_miss(rig: Rig) -> None:
    rig.hot.committed = 390
    async with rig.arbiter.room("new", 200, 300):
        assert rig.ledger.free_bytes == 300
        rig.arbiter.changed()
        rig.ledger.reserve("new", weights=300)
    assert (rig.hot.quota, rig.idle.quota) == (390, 110)


async def test_an_activation_gets_less_where_there_is_less(rig: Rig) -> None:
    rig.hot.committed = 390
    async with rig.arbiter.room("new", 200, 900):
        assert rig.ledger.free_bytes == 360


async def test_an_activation_that_cannot_fit_takes_nothing_and_does_not_wait(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_arbiter, "ROOM_DEADLINE_S", 1000.0)
    rig.hot.committed = 390
    async with asyncio.timeout(DEADLINE_S), rig.arbiter.room("new", 800, 900):
        assert rig.ledger.free_bytes == 0
    assert (rig.hot.asked, rig.idle.asked) == ([], [])


async def test_what_was_freed_for_an_activation_goes_to_nobody_else(rig: Rig) -> None:
    async with rig.arbiter.room("new", 200, 300):
        rig.want(800)
        while rig.hot.quota < 450:
            await rig.until_changed()
        assert rig.ledger.free_bytes >= 300


async def test_an_activation_waits_for_a_quota_that_is_being_changed(rig: Rig) -> None:
    rig.hot.committed = 390
    rig.idle.confirm.clear()
    rig.want(500)
    await asyncio.wait_for(rig.idle.was_asked.wait(), DEADLINE_S)
    rig.hot.wanted = 0
    asked = asyncio.create_task(free_for(rig, "new", 150, 200))
    await asyncio.sleep(0)
    assert not asked.done()
    rig.idle.confirm.set()
    assert await asyncio.wait_for(asked, DEADLINE_S) >= 150


async def test_an_activation_takes_of_two_models_no_more_than_each_can_spare(rig: Rig) -> None:
    rig.hot.committed, rig.idle.committed = 300, 300
    rig.hot.confirm.clear()
    asked = asyncio.create_task(free_for(rig, "new", 200, 200))
    await asyncio.wait_for(rig.idle.was_asked.wait(), DEADLINE_S)
    while rig.idle.quota > 300:
        await rig.until_changed()
    for _ in range(3):
        # It looks again, with one of the two confirmed.
        rig.arbiter.changed()
        await asyncio.sleep(0.06)
    assert not asked.done()
    rig.hot.confirm.set()
    assert await asyncio.wait_for(asked, DEADLINE_S) == 200
    assert (rig.hot.quota, rig.idle.quota) == (300, 300)


async def test_two_activations_at_once_do_not_count_on_the_same_memory(rig: Rig) -> None:
    rig.hot.committed, rig.idle.committed = 300, 300
    got = await asyncio.gather(*(free_for(rig, name, 100, 100) for name in ("new", "newer")))
    assert min(got) >= 100
    assert rig.ledger.held("new").kv == rig.ledger.held("newer").kv == 100
    assert (rig.hot.quota, rig.idle.quota) == (300, 300)


async def free_for(rig: Rig, model: str, least: int, wanted: int) -> int:
    """Reserve `least` of what is kept free for `model`; what there was."""
    async with rig.arbiter.room(model, least, wanted):
        free = rig.ledger.free_bytes
        rig.ledger.reserve(model, kv=least)
        return free


async def test_unless_it_moves_quotas_an_activation_gets_what_is_free_and_takes_nothing() -> None:
    async with asyncio.TaskGroup() as tasks:
        rig = Rig(tasks, moves=False)
        rig.want(700)
        async with asyncio.timeout(DEADLINE_S), rig.arbiter.room("new", 200, 300):
            assert rig.ledger.free_bytes == LIMIT - 2 * 500
    assert (rig.hot.asked, rig.idle.asked) == ([], [])
