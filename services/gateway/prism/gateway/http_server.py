"""uvicorn in this process's event loop, on a socket of ours, with its signals and its end in our hands."""

import asyncio
import contextlib
import logging
import select
import socket
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp

from prism.common.errors import ErrorCode, PrismError
from prism.common.tasks import end_task
from prism.gateway.http_protocol import GatewayHttpProtocol

log = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 65
CLOSE_DEADLINE_S = 5.0
TAKE_DEADLINE_S = 1.0
FIRST_REQUEST_S = 2.0
"""How long a connection that was made before the listening socket closed has for its first request."""
EMPTY_LOOKS = 3
"""Looks at an empty queue, a turn of the event loop each: what was taken last is a connection by then."""


class HttpServer(uvicorn.Server):
    """A listening server; `url` is where."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url
        self._closed = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the service."""
        yield

    def stop_accepting(self) -> None:
        """Close the listening socket, then idle connections; exchanges in progress go on.

        Whoever has connected by then is still answered: a client can't tell a connection that nobody took
        from one that broke.
        """
        self.should_exit = True

    async def closed(self) -> None:
        """Wait, after `stop_accepting`, until what can still begin has begun."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await self._closed.wait()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end. However that ends, nothing begins any more."""
        try:
            await super().serve(sockets)
        finally:
            self._closed.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close; called by uvicorn once it has seen that it should."""
        await _taken(sockets or [])
        for server in self.servers:
            server.close()
        connections = [
            each for each in self.server_state.connections if isinstance(each, GatewayHttpProtocol)
        ]
        waits = [asyncio.create_task(each.begun.wait()) for each in connections if not each.begun.is_set()]
        if waits:
            await asyncio.wait(waits, timeout=FIRST_REQUEST_S)
        for wait in waits:
            wait.cancel()
        self._closed.set()
        await super().shutdown(sockets)


async def _taken(listeners: Sequence[socket.socket]) -> None:
    """Wait until no connection waits in the listeners' queues, which would be reset with them."""
    poll = select.poll()
    for listener in listeners:
        poll.register(listener, select.POLLIN)
    empty = 0
    deadline = asyncio.get_running_loop().time() + TAKE_DEADLINE_S
    while empty < EMPTY_LOOKS and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0)
        empty = 0 if poll.poll(0) else empty + 1


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, or asyncio leaves Nagle's delay on accepted connections.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise PrismError(
            ErrorCode.INTERNAL,
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port (0: any free one)",
        ) from error
    return listener


@asynccontextmanager
async def http_server(app: ASGIApp, host: str, port: int) -> AsyncIterator[HttpServer]:
    """Serve `app` until the block ends; port 0 lets the kernel choose. Raises PrismError(internal) when the
    address is taken. At the end connections that do not close by themselves are cut. A server that fails
    ends the block with its error, in a group."""
    listener = _listen(host, port)
    bound = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app,
        http=GatewayHttpProtocol,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = HttpServer(config, f"http://{shown}:{bound}")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(server.serve(sockets=[listener]), name="http server")
        try:
            yield server
        finally:
            server.stop_accepting()
            await asyncio.wait({task}, timeout=CLOSE_DEADLINE_S)
            if not task.done():
                log.warning("cutting %d connections that stay open", len(server.server_state.connections))
                server.force_exit = True
                for connection in list(server.server_state.connections):
                    connection.transport.abort()
                await asyncio.wait({task}, timeout=CLOSE_DEADLINE_S)
            await end_task(task)
            listener.close()
