"""The NATS connection of one service: typed publish, request and subscribe, KV buckets, micro service.

Handlers run as tracked tasks, because callbacks of one nats-py subscription run one after the other and a
slow one would hold up all others. Everything started here ends when the `async with` ends.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import KeyValueConfig, ObjectStoreConfig, StorageType
from nats.js.kv import KeyValue
from nats.js.object_store import ObjectStore

from prism.common import subjects
from prism.common.errors import ErrorCode, PrismError, words_of
from prism.common.messages.codec import decode, encode, names_in
from prism.common.messages.events import Event
from prism.common.nats_client import close_client, connect_client
from prism.common.telemetry import about

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[Msg], Awaitable[None]]

LEADER_TTL_S = 2.0
GPU_ID_TTL_S = 2.4
BUCKET_TTL_S: Mapping[str, float] = {
    subjects.BUCKET_LEADER: LEADER_TTL_S,
    subjects.BUCKET_GPU_IDS: GPU_ID_TTL_S,
}
"""Entries of these buckets expire unless they are written again within so long; those of others stay. The
server takes up to a third of a second more for it (measured)."""

CONNECT_DEADLINE_S = 30.0
DRAIN_DEADLINE_S = 10.0
HANDLERS_DEADLINE_S = 10.0
PENDING_MESSAGES = 1_048_576
PENDING_BYTES = 512 * 1024 * 1024


class Bus:
    """A connected client. Made by `connect_bus`; holds no state of its own beyond the handlers' tasks.

    What is in `on_return` is called each time the connection is back after a loss; what was sent to or from
    here around the loss may be gone.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream()
        self.on_return: list[Callable[[], None]] = []
        self._handling: set[asyncio.Task[None]] = set()

    @property
    def max_payload(self) -> int:
        """Largest message in bytes that the server takes."""
        return int(self.client.max_payload)

    async def publish(self, subject: str, message: object, *, reply: str = "") -> None:
        """Send `message` as JSON. Raises PrismError(payload_too_large) past the server's limit."""
        payload = encode(message)
        if len(payload) > self.max_payload:
            raise PrismError(
                ErrorCode.PAYLOAD_TOO_LARGE,
                f"{len(payload)} bytes for {subject} exceed the bus limit of {self.max_payload} bytes",
            )
        await self.client.publish(subject, payload, reply=reply)

    async def request(self, subject: str, message: object, kind: type[T], *, timeout_s: float) -> T:
        """Ask and wait for the answer.

        Raises PrismError: moved when nobody listens on `subject`, deadline_exceeded when no answer came.
        """
        try:
            answer = await self.client.request(subject, encode(message), timeout=timeout_s)
        except nats.errors.NoRespondersError as error:
            raise PrismError(ErrorCode.MOVED, f"nobody answers on {subject}", retry=True) from error
        except (nats.errors.TimeoutError, TimeoutError) as error:
            raise PrismError(
                ErrorCode.DEADLINE_EXCEEDED, f"no answer on {subject} within {timeout_s:.1f} s", retry=True
            ) from error
        return decode(answer.data, kind)

    async def subscribe(self, subject: str, handler: Handler, *, inline: bool = False) -> Subscription:
        """Call `handler` for each message.

        `inline` awaits it in the reader, in order: for handlers that never wait. Otherwise each message
        gets a task of its own. An exception in a handler is logged and ends only that call.
        """

        async def guarded(message: Msg) -> None:
            try:
                await handler(message)
            except asyncio.CancelledError:
                raise
            except PrismError as error:
                log.warning(
                    "message on %s refused: %s; is its sender of this version?",
                    message.subject,
                    error.message,
                    extra=about(**names_in(message.data)),
                )
            except Exception:
                log.exception(
                    "handler of %s failed, what it was to do is left out; please report it",
                    message.subject,
                    extra=about(**names_in(message.data)),
                )

        async def spawn(message: Msg) -> None:
            task = asyncio.create_task(guarded(message), name=f"handle {message.subject}")
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

        return await self.client.subscribe(
            subject,
            cb=guarded if inline else spawn,
            pending_msgs_limit=PENDING_MESSAGES,
            pending_bytes_limit=PENDING_BYTES,
        )

    async def leave(self, subscription: Subscription, timeout_s: float) -> None:
        """Listen no more, once all that was on its way has been handled: unsubscribing alone would drop it
        without a word to its senders. Past `timeout_s` it is dropped all the same."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.client._send_unsubscribe(subscription._id)
                await self.flush()
                await subscription._pending_queue.join()
                await subscription.unsubscribe()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.debug("left %s without its last messages: %r", subscription.subject, error)
            # Else it would be subscribed again with the next connection.
            self.client._remove_sub(subscription._id)

    async def finish_handlers(self, timeout_s: float) -> None:
        """Wait for handlers that still run, and cancel those that take longer than `timeout_s`."""
        if self._handling and timeout_s > 0:
            await asyncio.wait(self._handling, timeout=timeout_s)
        late = list(self._handling)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def flush(self, timeout_s: float = 10.0) -> None:
        """Wait until the server has taken all that was published and subscribed so far.

        Raises TimeoutError, or an error of NATS when the connection is lost.
        """
        async with asyncio.timeout(timeout_s):
            # nats-py's own flush asks the server ahead of what it still holds back, so its answer alone
            # would prove nothing.
            await self.client._flush_pending(force_flush=True)
            await self.client.flush()

    async def tell(self, event: Event) -> None:
        """Publish a life-cycle event; a bus that is away loses it, which is what events are allowed to be."""
        try:
            await self.publish(subjects.event(event.kind, event.model), event)
        except (nats.errors.Error, OSError, PrismError) as error:
            log.debug("event %s of %s not told: %s", event.kind, event.model, error)

    async def bucket(self, name: str) -> KeyValue:
        """The KV bucket `name`, made if it does not exist (several services may try at once)."""
        try:
            return await self.jetstream.key_value(name)
        except nats.js.errors.BucketNotFoundError:
            pass
        config = KeyValueConfig(bucket=name, storage=StorageType.FILE, ttl=BUCKET_TTL_S.get(name))
        try:
            return await self.jetstream.create_key_value(config)
        except nats.js.errors.APIError:
            return await self.jetstream.key_value(name)

    async def objects(self, name: str) -> ObjectStore:
        """The object store `name`, made if it does not exist."""
        try:
            return await self.jetstream.object_store(name)
        except nats.js.errors.NotFoundError:
            pass
        try:
            return await self.jetstream.create_object_store(
                name, config=ObjectStoreConfig(storage=StorageType.FILE)
            )
        except nats.js.errors.APIError:
            return await self.jetstream.object_store(name)


@asynccontextmanager
async def connect_bus(
    url: str, *, name: str, deadline_s: float = CONNECT_DEADLINE_S, **options: Any
) -> AsyncIterator[Bus]:
    """Connect to the server at `url` as `name`, and again whenever that is lost; drained at the end.

    `options` go to `nats.connect`. Raises PrismError: invalid_request for what is no URL, internal when the
    server cannot be reached within `deadline_s` or ends the connection for good, which cancels what is
    within.
    """

    owner = asyncio.current_task()
    assert owner is not None
    cancelled_before = owner.cancelling()
    closing = awaited = ended = False
    bus: Bus | None = None

    async def on_error(error: Exception) -> None:
        # The lack of a connection is told once, not with every attempt to get one.
        nonlocal awaited
        if bus is None and not awaited:
            awaited = True
            log.warning(
                "bus: no NATS server at %s yet (%s); trying for %.0f s", url, words_of(error), deadline_s
            )
        there = bus is not None and bus.client.is_connected
        log.log(logging.ERROR if there else logging.DEBUG, "bus: %s", words_of(error))

    async def on_disconnect() -> None:
        if bus is not None and not closing and not bus.client.is_closed:
            log.warning("bus: lost %s, reconnecting until it is back; see that its NATS server runs", url)

    async def on_reconnect() -> None:
        log.info("bus: connected to %s again", url)
        for call in bus.on_return if bus else []:
            call()

    async def on_close() -> None:
        # Of most errors that a server tells, nats-py does not come back.
        nonlocal ended
        if bus is not None and not closing and not ended:
            ended = True
            owner.cancel()

    client = await connect_client(
        url,
        deadline_s,
        name=name,
        error_cb=on_error,
        disconnected_cb=on_disconnect,
        reconnected_cb=on_reconnect,
        closed_cb=on_close,
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.25,
        drain_timeout=DRAIN_DEADLINE_S,
        **options,
    )
    bus = Bus(client)
    patience_s = 0.0
    try:
        yield bus
        patience_s = HANDLERS_DEADLINE_S
    except asyncio.CancelledError:
        if ended and owner.uncancel() <= cancelled_before:
            raise PrismError(
                ErrorCode.INTERNAL,
                f"the NATS server at {url} ended the connection for good: "
                f"{words_of(client.last_error)}; see its log and its limits",
            ) from None
        raise
    finally:
        closing = True
        try:
            await bus.finish_handlers(patience_s)
        finally:
            try:
                await close_client(client)
            finally:
                # Of messages that came while it was drained.
                await bus.finish_handlers(0.0)
