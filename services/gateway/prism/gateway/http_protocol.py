"""uvicorn's HTTP, with this gateway's form of error for what is not HTTP at all."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prism.gateway.errors_http import malformed_request_body


class GatewayHttpProtocol(HttpToolsProtocol):
    """One connection."""

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that the parser cannot read, and close."""
        body = malformed_request_body()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
