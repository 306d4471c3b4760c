"""The bus: typed messages over a real NATS server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nats.errors
import pytest
from nats.aio.client import Client, Srv
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

from prism.cli.nats_server import NatsServer, nats_server
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.errors import ErrorCode, PrismError
from prism.common.messages.codec import decode, encode
from prism.common.messages.generation import CancelRequest
from prism.common.messages.models import ModelSpec
from prism.common.mirror import mirror_bucket

pytestmark = pytest.mark.core

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
INFO = b'INFO {"server_id": "x", "version": "2.10.0", "max_payload": 1048576}\r\n'
"""What a NATS server says first."""


async def test_request_is_answered_with_the_decoded_reply(bus: Bus) -> None:
    async def answer(message: Msg) -> None:
        await message.respond(message.data)

    await bus.subscribe("here", answer)
    await bus.flush()
    assert await bus.request("here", CancelRequest("r1"), CancelRequest, timeout_s=5) == CancelRequest("r1")


async def test_request_to_nobody_fails_at_once(bus: Bus) -> None:
    with pytest.raises(PrismError) as caught:
        await bus.request("nobody", CancelRequest("r1"), CancelRequest, timeout_s=30)
    assert caught.value.code is ErrorCode.MOVED
    assert caught.value.retry


async def test_too_large_a_message_is_refused_before_it_is_sent(bus: Bus) -> None:
    with pytest.raises(PrismError) as caught:
        await bus.publish("here", CancelRequest("x" * bus.max_payload))
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


async def test_a_failing_handler_is_told_and_does_not_stop_the_next_message(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    got: asyncio.Queue[str] = asyncio.Queue()

    async def handle(message: Msg) -> None:
        rid = decode(message.data, CancelRequest).rid
        if rid == "bad":
            raise RuntimeError("boom")
        got.put_nowait(rid)

    await bus.subscribe("here", handle)
    await bus.flush()
    await bus.publish("here", CancelRequest("bad"))
    await bus.publish("here", CancelRequest("good"))
    assert await asyncio.wait_for(got.get(), 5) == "good"
    (record,) = caplog.records
    assert record.__dict__["about"] == {"rid": "bad"}


async def test_mirror_holds_what_the_bucket_holds_and_follows_it(bus: Bus) -> None:
    bucket = await bus.bucket(subjects.BUCKET_MODELS)
    await bucket.put("spec.a", encode(ModelSpec("a", "/a")))
    changes: asyncio.Queue[tuple[str, ModelSpec | None]] = asyncio.Queue()
    async with mirror_bucket(
        bus,
        subjects.BUCKET_MODELS,
        ModelSpec,
        pattern="spec.*",
        on_change=lambda key, value: changes.put_nowait((key, value)),
    ) as mirror:
        assert mirror.values == {"spec.a": ModelSpec("a", "/a")}
        await bucket.put("spec.b", encode(ModelSpec("b", "/b")))
        await bucket.delete("spec.a")
        seen = [await asyncio.wait_for(changes.get(), 5) for _ in range(3)]
        assert seen[1:] == [("spec.b", ModelSpec("b", "/b")), ("spec.a", None)]
        assert list(mirror.values) == ["spec.b"]


async def test_leaving_a_subject_handles_all_that_was_on_its_way(bus: Bus, fresh_nats: NatsServer) -> None:
    handled: list[str] = []

    async def handle(message: Msg) -> None:
        handled.append(decode(message.data, CancelRequest).rid)

    async with connect_bus(fresh_nats.url, name="sender") as sender:
        for number in range(20):
            subscription = await bus.subscribe("here", handle, inline=True)
            await bus.flush()
            sent = [f"{number}/{index}" for index in range(100)]
            handled.clear()
            for rid in sent:
                await sender.publish("here", CancelRequest(rid))
            await sender.flush()
            await bus.leave(subscription, 5)
            assert handled == sent


async def test_leaving_a_subject_of_a_bus_that_is_away_does_not_wait_for_it(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        port = urlsplit(server.url).port
        assert port is not None
        async with connect_bus(server.url, name="test") as bus:

            async def handle(message: Msg) -> None:
                raise AssertionError(message.subject)

            subscription = await bus.subscribe("here", handle)
            back = asyncio.Event()
            bus.on_return.append(back.set)
            server.stop()
            async with asyncio.timeout(5):
                await bus.leave(subscription, 0.2)
            with nats_server(tmp_path, port=port) as again:
                async with connect_bus(again.url, name="other") as other, asyncio.timeout(10):
                    await back.wait()
                    with pytest.raises(PrismError, match="nobody answers"):
                        await other.request("here", CancelRequest("r"), CancelRequest, timeout_s=5)


async def test_a_handler_that_never_ends_does_not_keep_the_connection_open(fresh_nats: NatsServer) -> None:
    started = asyncio.Event()
    cancelled = asyncio.Event()

    async def handle(_: Msg) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def use_and_fail() -> None:
        async with asyncio.timeout(20), connect_bus(fresh_nats.url, name="test") as bus:
            await bus.subscribe("here", handle)
            await bus.publish("here", CancelRequest("r"))
            await started.wait()
            raise RuntimeError("over")

    with pytest.raises(RuntimeError, match="over"):
        await use_and_fail()
    assert cancelled.is_set()


async def test_a_first_connection_has_a_deadline() -> None:
    async with asyncio.timeout(10):
        with pytest.raises(PrismError, match=r"no NATS server at nats://127\.0\.0\.1:1 within 1 s"):
            async with connect_bus("nats://127.0.0.1:1", name="test", deadline_s=1.0):
                pass


async def test_a_server_that_comes_within_the_deadline_is_waited_for(tmp_path: Path) -> None:
    with nats_server(tmp_path / "first") as server:
        port = int(server.url.rsplit(":", 1)[1])

    async def use() -> bool:
        async with connect_bus(server.url, name="test", deadline_s=20.0) as bus:
            return bus.client.is_connected

    waiting = asyncio.create_task(use())
    await asyncio.sleep(0)
    with nats_server(tmp_path / "second", port=port):
        assert await waiting


async def test_a_connection_that_is_given_up_half_way_is_closed() -> None:
    arrived, left = asyncio.Event(), asyncio.Event()

    async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        await reader.readuntil(b"PING\r\n")
        arrived.set()
        await reader.read()
        left.set()
        writer.close()

    async with scripted_server(never_answers) as url:

        async def connect() -> None:
            async with connect_bus(url, name="test"):
                pass

        connecting = asyncio.create_task(connect())
        async with asyncio.timeout(10.0):
            await arrived.wait()
            connecting.cancel()
            await asyncio.wait([connecting])
            assert connecting.cancelled()
            await left.wait()


async def test_a_try_to_reconnect_that_failed_leaves_no_socket() -> None:
    served, left = asyncio.Event(), asyncio.Event()

    async def goes_dumb(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not served.is_set():
            writer.write(INFO)
            await reader.readuntil(b"PING\r\n")
            writer.write(b"PONG\r\n")
            served.set()
        else:
            writer.write_eof()
            await reader.read()
            left.set()
        writer.close()

    async with scripted_server(goes_dumb) as url, connect_bus(url, name="test"), asyncio.timeout(10.0):
        await left.wait()


async def test_a_connection_that_cannot_be_drained_is_closed(
    fresh_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost_meanwhile(client: Client) -> None:
        raise nats.errors.ConnectionReconnectingError

    async with connect_bus(fresh_nats.url, name="test") as bus:
        monkeypatch.setattr(Client, "drain", lost_meanwhile)
    assert bus.client.is_closed


@pytest.mark.parametrize("inline", [True, False], ids=["its drain", "the wait for its handlers"])
async def test_a_connection_is_closed_though_this_is_cancelled(fresh_nats: NatsServer, inline: bool) -> None:
    opened: list[Bus] = []
    stuck, left = asyncio.Event(), asyncio.Event()

    async def never_done(message: Msg) -> None:
        stuck.set()
        await asyncio.Event().wait()

    async def use() -> None:
        async with connect_bus(fresh_nats.url, name="test") as bus:
            opened.append(bus)
            await bus.subscribe("here", never_done, inline=inline)
            await bus.publish("here", CancelRequest("r1"))
            await stuck.wait()
            left.set()

    using = asyncio.create_task(use())
    async with asyncio.timeout(10.0):
        await left.wait()
        while inline and not opened[0].client.is_draining:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0)
        using.cancel()
        await asyncio.wait([using])
    assert using.cancelled()
    assert opened[0].client.is_closed
    assert not opened[0]._handling
    assert writer_of(opened[0].client).is_closing()


async def test_no_handler_outlives_the_bus(fresh_nats: NatsServer) -> None:
    handled, cut = asyncio.Event(), asyncio.Event()

    async def slow(message: Msg) -> None:
        handled.set()
        try:
            await asyncio.Event().wait()
        finally:
            cut.set()

    async with connect_bus(fresh_nats.url, name="asks") as asking:
        async with connect_bus(fresh_nats.url, name="test") as bus:
            await bus.subscribe("here", slow)
            await bus.flush()
            finish = bus.finish_handlers

            async def while_it_is_drained(timeout_s: float) -> None:
                await finish(0.0)
                if not handled.is_set():
                    await asking.publish("here", CancelRequest("late"))
                    await asking.flush()

            bus.finish_handlers = while_it_is_drained  # type: ignore[method-assign]
        assert handled.is_set()
        assert cut.is_set()
        assert not bus._handling


async def test_a_connection_that_the_server_ends_for_good_is_an_error() -> None:
    async def has_enough(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n-ERR 'maximum connections exceeded'\r\n")
        await reader.read()
        writer.close()

    async with scripted_server(has_enough) as url, asyncio.timeout(10.0):
        with pytest.raises(
            PrismError, match=r"ended the connection for good: .*maximum connections exceeded"
        ):
            async with connect_bus(url, name="test"):
                await asyncio.Event().wait()


async def test_what_is_no_url_is_told_as_such() -> None:
    with pytest.raises(PrismError, match=r"'nats://here:abc' is no URL of a NATS server") as caught:
        async with connect_bus("nats://here:abc", name="test"):
            pass
    assert caught.value.code is ErrorCode.INVALID_REQUEST


async def test_a_reconnection_that_misses_its_end_is_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Client._connect_to_server
    reconnecting = asyncio.Event()

    async def misses_its_end(client: Client, server: Srv) -> None:
        # As `asyncio.wait_for` of Python 3.11 does in the moment when what it waits for is there.
        reconnecting.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await connect(client, server)

    with nats_server(tmp_path / "first") as server:
        connection = connect_bus(server.url, name="test")
        bus = await connection.__aenter__()
        monkeypatch.setattr(Client, "_connect_to_server", misses_its_end)
    with nats_server(tmp_path / "second", port=int(server.url.rsplit(":", 1)[1])):
        async with asyncio.timeout(20.0):
            await reconnecting.wait()
            await connection.__aexit__(None, None, None)
        assert bus.client.is_closed
        assert writer_of(bus.client).is_closing()
        task = bus.client._reconnection_task
        assert task is not None
        assert task.done()


@asynccontextmanager
async def scripted_server(serve: Serve) -> AsyncIterator[str]:
    """The URL of a server that does with each connection what `serve` does."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def writer_of(client: Client) -> asyncio.StreamWriter:
    """What a client's socket hangs on."""
    transport = client._transport
    assert isinstance(transport, TcpTransport)
    writer = transport._io_writer
    assert writer is not None
    return writer
