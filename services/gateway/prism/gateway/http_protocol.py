"""uvicorn's HTTP, with this gateway's form of error for what is not HTTP at all."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prism.gateway.errors_http import malformed_request_body


class GatewayHttpProtocol(HttpToolsProtocol):
    """One connection. `begun` is set once its first request is there, or can't come any more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.begun = asyncio.Event()

    def on_headers_complete(self) -> None:
        """A request is there."""
        super().on_headers_complete()
        self.begun.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.begun.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that the parser cannot read, and close."""
        body = malformed_request_body()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
