"""A minimal OpenAI backend without a model: the same text at the same pace as the simulated device's engines,
for gateways that want an HTTP server behind them.

Run as `python -m prism.bench.gateway.openai_backend`; it prints the port that it listens on. A request's
first token goes out at once; after that one ticker brings a token to all streams, as an engine's steps do.
`POST /pace` with `{"step_ms": ...}` sets the time between two steps.
"""

import asyncio
import sys
import time
from typing import Any, cast

import msgspec
import uvloop

from prism.common.simulated_text import stamp

MODEL = "simulated"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


def event(payload: object) -> bytes:
    """One server-sent event as one chunk."""
    data = b"data: " + (payload if isinstance(payload, bytes) else msgspec.json.encode(payload)) + b"\n\n"
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def chunk(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    """A chat completion chunk."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {
        "id": "chatcmpl-simulated",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
    }


ROLE = event(chunk({"role": "assistant", "content": ""}, None))
TEXT = {character: event(chunk({"content": character}, None)) for character in "0123456789."}
LAST = event(chunk({}, "length")) + event(b"[DONE]") + END


class Backend:
    """The streams in progress, and their pace."""

    def __init__(self) -> None:
        self.step_s = 0.02
        self.streams: set[Connection] = set()

    async def run(self) -> None:
        """Bring tokens until cancelled."""
        ends_at = time.monotonic()
        while True:
            now = time.monotonic()
            ends_at = max(ends_at + self.step_s, now)
            await asyncio.sleep(ends_at - now)
            for stream in list(self.streams):
                stream.next_token()


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffer = b""
        self._left = 0
        self._group = ""
        self._place = 0
        self._paused = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        # uvloop's transports are none by their class.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """The client has left."""
        self._backend.streams.discard(self)

    def pause_writing(self) -> None:
        """The client is slow."""
        self._paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._paused = False

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        self._buffer += data
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            lines = self._buffer[:end].decode("latin-1").split("\r\n")
            fields = (line.partition(":") for line in lines[1:])
            headers = {name.lower(): value.strip() for name, _, value in fields}
            length = int(headers.get("content-length", "0"))
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            words = lines[0].split(" ")
            if len(words) != 3 or words[2] != "HTTP/1.1":
                # A probe for HTTP/2.
                self._buffer = b""
                self._whole({"error": "HTTP/1.1 only"}, "400 Bad Request")
                return
            self._answer(words[1].partition("?")[0], body)

    def _answer(self, path: str, body: bytes) -> None:
        if path == "/v1/chat/completions":
            self._begin(msgspec.json.decode(body))
        elif path == "/pace":
            self._backend.step_s = msgspec.json.decode(body)["step_ms"] / 1000
            self._whole({"step_ms": self._backend.step_s * 1000})
        elif path == "/v1/models":
            self._whole({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bench"}]})
        else:
            self._whole({"status": "ok", "model_path": MODEL, "served_model_name": MODEL})

    def _whole(self, content: object, status: str = "200 OK") -> None:
        assert self._transport is not None
        payload = msgspec.json.encode(content)
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        )
        self._transport.write(head.encode() + payload)

    def _begin(self, request: dict[str, Any]) -> None:
        assert self._transport is not None
        # A proxy may rename it.
        self._left = int(request.get("max_completion_tokens") or request["max_tokens"])
        self._group, self._place = "", 0
        self._transport.write(STREAM_HEAD + ROLE)
        self._backend.streams.add(self)
        self.next_token()

    def next_token(self) -> None:
        """Send the next token, unless the client has yet to take those before."""
        if self._paused:
            return
        assert self._transport is not None
        if self._place == len(self._group):
            self._group, self._place = stamp(time.monotonic_ns() // 1000), 0
        data = TEXT[self._group[self._place]]
        self._place += 1
        self._left -= 1
        if not self._left:
            self._backend.streams.discard(self)
            data += LAST
        self._transport.write(data)


async def serve() -> None:
    """Listen until stdin ends."""
    backend = Backend()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(backend), "127.0.0.1", 0, backlog=1024)
    async with server:
        print(server.sockets[0].getsockname()[1], flush=True)
        ticker = asyncio.create_task(backend.run(), name="ticker")
        await asyncio.to_thread(sys.stdin.read)
        ticker.cancel()
        await asyncio.gather(ticker, return_exceptions=True)
        server.close()


def main() -> None:
    """Be a backend."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
