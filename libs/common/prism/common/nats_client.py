"""A connection of nats-py's that is made within a deadline, and leaves no socket and no task behind."""

import asyncio
import logging
from typing import Any

import nats.errors
from nats.aio.client import Client, Srv

from prism.common.errors import ErrorCode, PrismError, words_of
from prism.common.tasks import end_task

log = logging.getLogger(__name__)

CLOSE_DEADLINE_S = 5.0


class _Client(Client):
    """A client whose tries to reconnect leave no socket behind: nats-py forgets that of one that a server
    took, and ended before it said a word."""

    async def _connect_to_server(self, s: Srv) -> None:
        if self._transport:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)


async def connect_client(url: str, deadline_s: float, **options: Any) -> Client:
    """A connection to the server at `url`; `options` go to `nats.connect`. Raises PrismError: invalid_request
    for what is no URL, internal when the server cannot be reached within `deadline_s`."""
    client = _Client()
    try:
        # Told never to give up a connection, nats-py tries for the first one without an end, too.
        async with asyncio.timeout(deadline_s):
            await client.connect(url, allow_reconnect=True, connect_timeout=2, **options)
    except TimeoutError as error:
        reason = words_of(client.last_error) if client.last_error else "it does not answer"
        await close_client(client)
        raise PrismError(
            ErrorCode.INTERNAL,
            f"no NATS server at {url} within {deadline_s:.0f} s ({reason}); start one, or point --nats at it",
        ) from error
    except nats.errors.Error as error:
        # Of its tries it tells none; this is before the first, and there is nothing to close.
        text = f"{url!r} is no URL of a NATS server ({error}); nats://HOST:PORT is one"
        raise PrismError(ErrorCode.INVALID_REQUEST, text) from error
    except BaseException:
        await close_client(client)
        raise
    return client


async def close_client(client: Client) -> None:
    """Drain it where that can be done, and close it whatever happens."""
    # One that could not be drained, since it was lost meanwhile or there is no time, is closed all the same.
    draining = asyncio.create_task(client.drain(), name="drain bus") if client.is_connected else None
    try:
        if draining is not None:
            await asyncio.wait([draining])
    finally:
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                # Else a closed client would connect again: nats-py's own cancellation may be forgotten.
                for task in (draining, client._reconnection_task):
                    if task is not None:
                        await end_task(task)
                await client.close()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.debug("bus: closed with %s", words_of(error))
        finally:
            if client._transport is not None:
                client._transport.close()  # type: ignore[no-untyped-call]
    if draining is not None and not draining.cancelled() and draining.exception() is not None:
        log.debug("bus: not drained: %s", words_of(draining.exception()))
