"""GPU ids claimed on a real NATS server: by workers that come at once, die, are replaced, lose the bus."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from nats.aio.msg import Msg
from nats.js.errors import KeyNotFoundError

from prism.cli.nats_server import NatsServer, nats_server
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.load import LoadReport
from prism.common.messages.placement import GpuIdClaim
from prism.gpu_worker.gpu_id_claims import GpuIdClaims, claimed_gpu_ids

pytestmark = pytest.mark.core

DEADLINE_S = 30.0


class Changes:
    """The ids that a worker comes to go by, one after the other."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self._changed = asyncio.Event()

    def __call__(self, ids: list[int]) -> None:
        self.seen.append(ids)
        self._changed.set()

    async def until(self, wanted: list[list[int]]) -> None:
        """Wait until the changes are those that are `wanted`."""
        async with asyncio.timeout(DEADLINE_S):
            while self.seen != wanted:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def claiming(
    url: str, worker: str, *, first: int | None = None, count: int = 1, changes: Changes | None = None
) -> AsyncIterator[GpuIdClaims]:
    """A worker's claims over a connection of its own."""
    async with (
        connect_bus(url, name=worker) as bus,
        asyncio.timeout(DEADLINE_S),
        claimed_gpu_ids(
            bus, GpuIdClaim(worker, "node"), changes or Changes(), first=first, count=count
        ) as claims,
    ):
        yield claims


async def holder(bus: Bus, gpu_id: int) -> str:
    """The worker whose claim on `gpu_id` is in the bucket."""
    entry = await (await bus.bucket(subjects.BUCKET_GPU_IDS)).get(subjects.gpu_id_key(gpu_id))
    return decode(entry.value or b"", GpuIdClaim).worker


async def put_claim(bus: Bus, gpu_id: int, worker: str) -> None:
    bucket = await bus.bucket(subjects.BUCKET_GPU_IDS)
    await bucket.put(subjects.gpu_id_key(gpu_id), encode(GpuIdClaim(worker, "node")))


async def until_written_again(bus: Bus, gpu_id: int) -> str:
    """Wait for the next write of the claim on `gpu_id`; whose it is."""
    bucket = await bus.bucket(subjects.BUCKET_GPU_IDS)
    watcher = await bucket.watch(subjects.gpu_id_key(gpu_id), include_history=False)
    there_already = True
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                entry = await watcher.updates(timeout=DEADLINE_S)
                if entry is None:
                    there_already = False
                elif entry.operation is None and not there_already:
                    return decode(entry.value or b"", GpuIdClaim).worker
    finally:
        await watcher.stop()


async def test_workers_that_come_at_once_get_ids_from_0_on(fresh_nats: NatsServer) -> None:
    async with AsyncExitStack() as stack:
        workers = await asyncio.gather(
            *(stack.enter_async_context(claiming(fresh_nats.url, f"w{number}")) for number in range(2))
        )
        assert sorted(worker.ids[0] for worker in workers) == [0, 1]
        more = [claiming(fresh_nats.url, f"w{number}") for number in range(2, 8)]
        workers += await asyncio.gather(*(stack.enter_async_context(worker) for worker in more))
        assert sorted(worker.ids[0] for worker in workers) == list(range(8))


async def test_ids_are_given_back_at_the_end(fresh_nats: NatsServer, bus: Bus) -> None:
    async with claiming(fresh_nats.url, "stays") as stays:
        assert stays.ids == [0]
        async with claiming(fresh_nats.url, "goes") as goes:
            assert goes.ids == [1]
        with pytest.raises(KeyNotFoundError):
            await holder(bus, 1)
        async with claiming(fresh_nats.url, "comes") as comes:
            assert comes.ids == [1]


async def test_the_id_of_a_worker_that_vanished_is_waited_for(fresh_nats: NatsServer, bus: Bus) -> None:
    async with claiming(fresh_nats.url, "stays") as stays:
        assert stays.ids == [0]
        await put_claim(bus, 1, "vanished")
        async with claiming(fresh_nats.url, "replaces") as replaces:
            assert replaces.ids == [1]
            assert await holder(bus, 1) == "replaces"


async def test_workers_of_several_gpus_get_them_in_a_row(fresh_nats: NatsServer) -> None:
    async with (
        claiming(fresh_nats.url, "one") as one,
        claiming(fresh_nats.url, "two", count=2) as two,
        claiming(fresh_nats.url, "three") as three,
    ):
        assert (one.ids, two.ids, three.ids) == ([0], [1, 2], [3])


async def test_a_claim_lives_for_as_long_as_its_worker(fresh_nats: NatsServer, bus: Bus) -> None:
    changes = Changes()
    async with claiming(fresh_nats.url, "lives", changes=changes):
        # More renewals than fit into the time that an entry lives.
        for _ in range(4):
            assert await until_written_again(bus, 0) == "lives"
        assert changes.seen == [[0]]


async def test_a_renewal_whose_answer_was_lost_does_not_cost_the_id(fresh_nats: NatsServer, bus: Bus) -> None:
    changes = Changes()
    async with claiming(fresh_nats.url, "one", changes=changes):
        await put_claim(bus, 0, "one")
        assert await until_written_again(bus, 0) == "one"
        assert changes.seen == [[0]]


async def test_an_id_that_another_took_is_given_up_for_a_free_one(fresh_nats: NatsServer, bus: Bus) -> None:
    changes = Changes()
    async with (
        claiming(fresh_nats.url, "loses", changes=changes),
        claiming(fresh_nats.url, "beside") as beside,
    ):
        assert beside.ids == [1]
        await put_claim(bus, 0, "usurper")
        async with claiming(fresh_nats.url, "usurper", first=0):
            await changes.until([[0], [], [2]])


@contextmanager
def replaced_server(server: NatsServer, folder: Path) -> Iterator[None]:
    """Another server in the place of `server`, with the state in `folder`."""
    port = urlsplit(server.url).port
    assert port is not None
    server.stop()
    with nats_server(folder, port=port):
        yield


@pytest.mark.parametrize("state", ["nats", "another"])
async def test_a_bus_that_comes_back_finds_everybody_with_the_same_ids(
    fresh_nats: NatsServer, tmp_path: Path, state: str
) -> None:
    changes = [Changes(), Changes()]
    async with (
        claiming(fresh_nats.url, "w0", changes=changes[0]),
        claiming(fresh_nats.url, "w1", changes=changes[1]),
    ):
        with replaced_server(fresh_nats, tmp_path / state):
            async with connect_bus(fresh_nats.url, name="test") as bus:
                for _ in range(3):
                    assert await until_written_again(bus, 0) == "w0"
                assert await until_written_again(bus, 1) == "w1"
                async with claiming(fresh_nats.url, "w2") as third:
                    assert third.ids == [2]
            assert [change.seen for change in changes] == [[[0]], [[1]]]


async def test_without_a_bus_there_is_an_end_to_the_waiting(fresh_nats: NatsServer) -> None:
    async with connect_bus(fresh_nats.url, name="w") as bus:
        fresh_nats.stop()
        with pytest.raises(ExceptionGroup) as caught:
            async with claimed_gpu_ids(bus, GpuIdClaim("w", "node"), Changes(), first=None, deadline_s=0.5):
                raise AssertionError("claimed without a bus")
        (error,) = caught.value.exceptions
        assert isinstance(error, PrismError)
        assert error.code is ErrorCode.DEADLINE_EXCEEDED
        assert "--first-gpu-id" in error.message


async def test_a_named_id_is_there_at_once_and_passed_over_by_those_that_look(fresh_nats: NatsServer) -> None:
    changes = Changes()
    async with claiming(fresh_nats.url, "named", first=1, changes=changes) as named:
        assert (named.ids, changes.seen) == ([1], [[1]])
        async with claiming(fresh_nats.url, "a") as a, claiming(fresh_nats.url, "b") as b:
            assert (a.ids, b.ids) == ([0], [2])


async def test_a_named_id_that_a_living_worker_has_is_warned_of_and_kept(
    fresh_nats: NatsServer, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    warned = asyncio.Event()
    handler = logging.Handler()
    handler.emit = lambda record: warned.set()  # type: ignore[method-assign]
    logger = logging.getLogger("prism.gpu_worker.gpu_id_claims")
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        await put_claim(bus, 0, "vanished")
        async with claiming(fresh_nats.url, "named", first=0) as named:
            assert await until_written_again(bus, 0) == "named"
            assert not warned.is_set(), "its predecessor's entry is no other worker"
            async with claiming(fresh_nats.url, "second", first=0) as second:
                await asyncio.wait_for(warned.wait(), DEADLINE_S)
                assert (named.ids, second.ids) == ([0], [0])
                assert "its own --first-gpu-id" in caplog.text
    finally:
        logger.removeHandler(handler)


class Reports:
    """The load reports of all workers, and whom they are of."""

    def __init__(self) -> None:
        self.gpu_ids: dict[str, list[int]] = {}
        self.first: dict[str, list[int]] = {}
        self._gone: set[str] = set()
        self._more = asyncio.Event()

    async def take(self, message: Msg) -> None:
        report = decode(message.data, LoadReport)
        if report.worker in self._gone:
            return
        self.first.setdefault(report.worker, report.gpu_ids)
        self.gpu_ids[report.worker] = report.gpu_ids
        self._more.set()

    def forget(self, worker: str) -> None:
        """It is gone, though a report of it may be under way still."""
        self._gone.add(worker)
        del self.gpu_ids[worker]

    async def until(self, wanted: list[list[int]]) -> None:
        """Wait until the workers seen so far have reported these ids, in some order."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while sorted(self.gpu_ids.values()) != wanted:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            pytest.fail(f"{self.gpu_ids} instead of {wanted}")


@asynccontextmanager
async def worker_process(url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker as a container would run it: all that it is told is the same for all of them."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.gpu_worker", "--nats", url, "--store-socket", "/nowhere.sock"),
        *("--device", "simulated", "--first-gpu-id", "auto"),
        env={**os.environ, "PRISM_PARENT_PID": str(os.getpid())},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE_S)


async def test_worker_processes_report_ids_of_their_own_and_a_killed_one_is_replaced(
    fresh_nats: NatsServer, bus: Bus
) -> None:
    reports = Reports()
    await bus.subscribe(subjects.load("*"), reports.take, inline=True)
    await bus.flush()
    async with worker_process(fresh_nats.url) as first:
        await reports.until([[0]])
        (killed,) = reports.gpu_ids
        async with worker_process(fresh_nats.url):
            await reports.until([[0], [1]])
            first.kill()
            await first.wait()
            reports.forget(killed)
            async with worker_process(fresh_nats.url):
                await reports.until([[0], [1]])
                assert await holder(bus, 0) != killed
                await put_claim(bus, 1, "usurper")
                await reports.until([[], [0]])
                await reports.until([[0], [1]])
    assert all(reports.first.values()), "nobody reports before it has ids"
