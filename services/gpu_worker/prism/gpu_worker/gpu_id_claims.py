"""The cluster-wide ids of this worker's GPUs, held as entries of a KV bucket that expire unless renewed.

An id has one holder as long as the bus keeps its state. A bus that was away for longer than entries live has
forgotten everybody's: each worker takes its own ids again, and one that finds them taken claims others.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import nats.js.errors

from prism.common import subjects
from prism.common.bus import GPU_ID_TTL_S, Bus
from prism.common.errors import ErrorCode, PrismError, words_of
from prism.common.leases import LEASE_ERRORS, LeaseBucket
from prism.common.messages.codec import encode
from prism.common.messages.placement import GpuIdClaim
from prism.common.tasks import end_task
from prism.gpu_worker.gpu_id_choice import Revisions, is_living, lowest_free_block

log = logging.getLogger(__name__)

RENEW_S = GPU_ID_TTL_S / 3
POLL_S = GPU_ID_TTL_S / 6
STEP_DEADLINE_S = GPU_ID_TTL_S / 2
CLAIM_DEADLINE_S = 30.0


class GpuIdClaims:
    """The claims of one worker. Made by `claimed_gpu_ids`.

    `ids` are those that it goes by: the `named` ones whatever happens, else the `count` that it has claimed;
    none while it looks for others because it lost them. `on_change(ids)` is called with each change.
    """

    def __init__(
        self,
        bus: Bus,
        claim: GpuIdClaim,
        named: range | None,
        count: int,
        on_change: Callable[[list[int]], None],
    ) -> None:
        self.ids: list[int] = list(named or ())
        self.obstacle = "the bus does not answer"
        self._bus = bus
        self._leases = LeaseBucket(bus, subjects.BUCKET_GPU_IDS, encode(claim))
        self._named = named
        self._count = count
        self._on_change = on_change
        self._held: dict[int, int] = {}
        self._first_look: Revisions | None = None
        self._warned = False
        self._has_ids = asyncio.Event()
        self._bus_is_back = asyncio.Event()
        if named:
            self._set_ids(list(named))

    async def first_ids(self) -> None:
        """Wait until there are ids."""
        await self._has_ids.wait()

    def bus_returned(self) -> None:
        """Renew at once: the claims may have expired, and others want ids, too."""
        self._bus_is_back.set()

    async def run(self) -> None:
        """Claim, and renew what is claimed, until cancelled; the bus may come and go."""
        while True:
            self._bus_is_back.clear()
            pause_s = POLL_S
            try:
                async with asyncio.timeout(STEP_DEADLINE_S):
                    await self._renew_all()
                    await (self._claim_named() if self._named else self._claim_lowest())
                if self.ids:
                    pause_s = RENEW_S
            except LEASE_ERRORS as error:
                self.obstacle = words_of(error)
                log.debug("GPU ids not renewed: %r", error)
                self._leases.failed()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._bus_is_back.wait()

    async def give_back(self) -> None:
        """Let others have the ids at once; a bus that is away lets them expire."""
        try:
            async with asyncio.timeout(RENEW_S):
                for gpu_id in list(self._held):
                    await self._release(gpu_id)
        except LEASE_ERRORS as error:
            log.debug("GPU ids not given back: %r", error)

    async def _renew_all(self) -> None:
        for gpu_id, revision in list(self._held.items()):
            renewed = await self._leases.renew(subjects.gpu_id_key(gpu_id), revision)
            if renewed is not None:
                self._held[gpu_id] = renewed
            # Else expired, lost with the bus's state, taken by another, or renewed and the answer was lost.
            elif not await self._take(gpu_id):
                self._lose(gpu_id)

    def _lose(self, gpu_id: int) -> None:
        del self._held[gpu_id]
        if self._named is None:
            log.warning("GPU id %d was taken by another worker while the bus was away, claiming anew", gpu_id)
            self._set_ids([])

    async def _claim_lowest(self) -> None:
        """Claim free ids, if any are wanted and none has to be waited for."""
        while not self.ids:
            others = await self._look()
            block = lowest_free_block(self._count, self._first_look or {}, others)
            if block is None:
                self.obstacle = "claims that nobody renews do not expire"
                return
            for gpu_id in set(self._held).difference(block):
                await self._release(gpu_id)
            for gpu_id in block:
                if not await self._holds(gpu_id):
                    # Somebody was faster, and stands in the next look.
                    break
            else:
                log.info("GPU ids claimed: %s", ", ".join(map(str, block)))
                self._first_look = None
                self._set_ids(list(block))

    async def _claim_named(self) -> None:
        """Claim what operators gave this worker, and tell if a living one has claimed it."""
        missing = [gpu_id for gpu_id in self.ids if not await self._holds(gpu_id)]
        if not missing:
            self._first_look = None
            return
        others = await self._look()
        living = [gpu_id for gpu_id in missing if is_living(gpu_id, self._first_look or {}, others)]
        if living and not self._warned:
            self._warned = True
            log.warning(
                "GPU id %d is another worker's, too: models placed on it may go to either; "
                "give each worker its own --first-gpu-id, or `auto`",
                living[0],
            )

    async def _holds(self, gpu_id: int) -> bool:
        return gpu_id in self._held or await self._take(gpu_id)

    async def _take(self, gpu_id: int) -> bool:
        """Make the claim on `gpu_id` if there is none; whether it is ours now."""
        revision = await self._leases.take(subjects.gpu_id_key(gpu_id))
        if revision is not None:
            self._held[gpu_id] = revision
        return revision is not None

    async def _release(self, gpu_id: int) -> None:
        self._held.pop(gpu_id, None)
        await self._leases.give_back(subjects.gpu_id_key(gpu_id))

    async def _look(self) -> Revisions:
        """The claims of others, now. The first look after ids were last held is remembered."""
        bucket = await self._leases.bucket()
        stream = await self._bus.jetstream.stream_info(f"KV_{subjects.BUCKET_GPU_IDS}", subjects_filter=">")
        others: dict[int, int] = {}
        for subject in stream.state.subjects or {}:
            key = subject.rpartition(".")[2]
            if not key.isdecimal():
                continue
            with contextlib.suppress(nats.js.errors.KeyNotFoundError):
                entry = await bucket.get(key)
                if entry.value != self._leases.record:
                    others[int(key)] = int(entry.revision)
        if self._first_look is None:
            self._first_look = others
        return others

    def _set_ids(self, ids: list[int]) -> None:
        self.ids = ids
        if ids:
            self._has_ids.set()
        self._on_change(ids)


@asynccontextmanager
async def claimed_gpu_ids(
    bus: Bus,
    claim: GpuIdClaim,
    on_change: Callable[[list[int]], None],
    *,
    first: int | None,
    count: int = 1,
    deadline_s: float = CLAIM_DEADLINE_S,
) -> AsyncIterator[GpuIdClaims]:
    """`count` consecutive GPU ids for the worker that `claim` names, until the end of the `async with`, which
    gives them back: those from `first` on without waiting for anything, or with None the lowest free ones.

    Raises PrismError(deadline_exceeded), in a group, when none could be claimed within `deadline_s` seconds.
    """
    named = None if first is None else range(first, first + count)
    claims = GpuIdClaims(bus, claim, named, count, on_change)
    bus.on_return.append(claims.bus_returned)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(claims.run(), name="GPU id claims")
        try:
            try:
                async with asyncio.timeout(deadline_s):
                    await claims.first_ids()
            except TimeoutError as error:
                raise PrismError(
                    ErrorCode.DEADLINE_EXCEEDED,
                    f"no GPU id could be claimed within {deadline_s:.0f} s: {claims.obstacle}; see that the "
                    "NATS server runs with JetStream, or name the id with --first-gpu-id",
                    retry=True,
                ) from error
            yield claims
        finally:
            await end_task(task)
            await claims.give_back()
