"""uvicorn in this process's event loop, on a socket of ours, with its signals and its end in our hands."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Generator
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


class HttpServer(uvicorn.Server):
    """A listening server; `url` is where."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the service."""
        yield

    def stop_accepting(self) -> None:
        """Close the listening socket and idle connections; exchanges in progress go on."""
        self.should_exit = True


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
    address is taken. At the end connections that do not close by themselves are cut."""
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
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http server")
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
