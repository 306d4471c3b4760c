"""A lean reader of streamed HTTP/1.1 answers: what measures must not cost what it measures."""

import re

HEAD_END = b"\r\n\r\n"
CRLF = b"\r\n"
CONTENT = re.compile(rb'"content":\s?"([^"]*)"')


class StreamedAnswer:
    """One answer, fed as it comes. Only what the load needs of HTTP: a status, chunks or a length, an end."""

    def __init__(self) -> None:
        self.status = 0
        self.ended = False
        self._buffer = b""
        self._body = b""
        self._left = -1
        self._chunked = False

    def feed(self, data: bytes) -> bytes:
        """Take what was received; the text (of `content` fields) of the events that are complete now."""
        self._buffer += data
        if not self.status and not self._read_head():
            return b""
        if self._chunked:
            self._read_chunks()
        else:
            self._body += self._buffer
            self._left -= len(self._buffer)
            self._buffer = b""
            self.ended = self._left <= 0
        complete = len(self._body) if self.ended else self._body.rfind(b"\n\n") + 2
        if complete < 2:
            return b""
        text = b"".join(CONTENT.findall(self._body, 0, complete))
        self._body = self._body[complete:]
        return text

    def _read_head(self) -> bool:
        end = self._buffer.find(HEAD_END)
        if end < 0:
            return False
        head = self._buffer[:end].lower()
        self._buffer = self._buffer[end + len(HEAD_END) :]
        self.status = int(head.split(b" ", 2)[1])
        self._chunked = b"transfer-encoding: chunked" in head
        if not self._chunked:
            found = re.search(rb"content-length: (\d+)", head)
            if found is None:
                raise ValueError("an answer with neither chunks nor a length")
            self._left = int(found[1])
        return True

    def _read_chunks(self) -> None:
        parts = []
        position = 0
        buffer = self._buffer
        while True:
            if self._left < 0:
                line = buffer.find(CRLF, position)
                if line < 0:
                    break
                self._left = int(buffer[position:line], 16)
                if self._left == 0:
                    if len(buffer) < line + 4:
                        self._left = -1
                        break
                    self.ended = True
                    position = line + 4
                    break
                position = line + 2
            if len(buffer) - position < self._left + 2:
                break
            parts.append(buffer[position : position + self._left])
            position += self._left + 2
            self._left = -1
        self._buffer = buffer[position:]
        self._body += b"".join(parts)


def post(host: str, path: str, body: bytes) -> bytes:
    """A request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer sk-unused\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
