"""Moves KV memory between the engines of this worker: carries out what `prism.scheduling.quotas` plans.

One task owns it. It looks when demand changed, at most every ROUND_S, and plans from what is reserved: a
lowered quota is reserved in full until its engine has confirmed, a raised one from before its engine knows.
So the ledger's limit holds at every instant, and a plan can be carried out in any order. Each engine has one
change under way at most; one that does not answer in time is ended, as any engine that is stuck.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable

from prism.common.errors import PrismError
from prism.common.telemetry import about
from prism.gpu_worker.model_instance import ModelInstance
from prism.scheduling.ledger import MemoryLedger
from prism.scheduling.quotas import QuotaHolder, arbitrate

log = logging.getLogger(__name__)

ROUND_S = 0.05
LOOK_S = 0.5
ROOM_DEADLINE_S = 2.0


class QuotaArbiter:
    """Quotas of all active models of a worker. Unless it `moves` them they stay as they are."""

    def __init__(
        self,
        ledger: MemoryLedger,
        instances: Callable[[], Iterable[ModelInstance]],
        spawn: Callable[..., "asyncio.Task[None]"],
        *,
        on_changed: Callable[[], None],
        moves: bool = True,
    ) -> None:
        self.moves = moves
        self._ledger = ledger
        self._instances = instances
        self._spawn = spawn
        self._on_changed = on_changed
        self._demand = asyncio.Event()
        self._settled = asyncio.Event()
        self._under_way: dict[str, int] = {}
        """Models whose quota is being changed, with the bytes that they are to give back."""
        self._claims: dict[str, int] = {}

    def changed(self) -> None:
        """Demand changed: look again soon."""
        self._demand.set()

    async def run(self) -> None:
        """Follow demand until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._demand.wait()
            self._demand.clear()
            self._step()
            await asyncio.sleep(ROUND_S)

    def _holders(self) -> dict[str, QuotaHolder]:
        if not self.moves:
            return {}
        holders = (instance.quota_holder() for instance in self._instances())
        return {holder.model: holder for holder in holders if holder is not None}

    def _step(self) -> None:
        holders = self._holders()
        if not holders:
            return
        promised = sum(holder.quota_bytes for holder in holders.values())
        claimed = max(0, sum(self._claims.values()) - sum(self._under_way.values()))
        plan = arbitrate(self._ledger.free_bytes + promised - claimed, list(holders.values()))
        changes = plan.shrink | plan.grow
        for instance in self._instances():
            if instance.name in changes and instance.name not in self._under_way:
                kv_bytes = changes[instance.name]
                self._under_way[instance.name] = max(0, holders[instance.name].quota_bytes - kv_bytes)
                self._spawn(self._change(instance, kv_bytes), name=f"KV quota of {instance.name}")

    async def _change(self, instance: ModelInstance, kv_bytes: int) -> None:
        try:
            await instance.set_quota(kv_bytes)
        except PrismError as error:
            # Its end, if that is why, is told by whoever watches it.
            log.info("KV quota not changed: %s", error.message, extra=about(model=instance.name))
        finally:
            self._under_way.pop(instance.name, None)
            settled, self._settled = self._settled, asyncio.Event()
            settled.set()
            self.changed()
        self._on_changed()

    def _free_for(self, model: str) -> int:
        kept = sum(nbytes for other, nbytes in self._claims.items() if other != model)
        return self._ledger.free_bytes - kept

    @contextlib.asynccontextmanager
    async def room(self, model: str, least_bytes: int, wanted_bytes: int) -> AsyncIterator[None]:
        """Free up to `wanted_bytes` in the ledger for `model` and keep them free within the context.

        Only memory that no running request will miss is taken: free quota above the floors, then cached
        prefixes; what is kept free for others is not free. Waits ROOM_DEADLINE_S at most, and not at all
        where even `least_bytes` can't be had: then there is less, and whoever reserves is told so.
        """
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROOM_DEADLINE_S):
                    while (free := self._free_for(model)) < wanted_bytes:
                        spare = sum(holder.spare_bytes for holder in self._holders().values())
                        settled = self._settled
                        claim = min(wanted_bytes, free + spare)
                        if self._under_way:
                            # What is being given back is no longer spare, and not free yet.
                            claim = max(claim, self._claims.get(model, 0))
                        if claim >= least_bytes:
                            self._claims[model] = claim
                            if free >= claim:
                                break
                            self._step()
                        if not self._under_way:
                            break
                        await settled.wait()
            yield
        finally:
            self._claims.pop(model, None)
