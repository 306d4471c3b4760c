"""One question to everybody on a NATS server, over a bare socket: for commands that run every few seconds.

The NATS client takes half a second of a core to import, ten times what all of this costs.
"""

import json
import os
import socket
from collections.abc import Iterator
from time import monotonic
from typing import BinaryIO
from urllib.parse import SplitResult, urlsplit

DEFAULT_PORT = 4222
NO_RESPONDERS = b"NATS/1.0 503"


class NoAnswerError(Exception):
    """The server cannot be reached, refuses, or ends the connection: what is wrong and what to do, in one
    line."""


def answers(url: str, subject: str, deadline_s: float) -> Iterator[bytes]:
    """The payloads of all answers to an empty request on `subject` of the server at `url`, as they come.

    Ends when nobody is subscribed there, else after `deadline_s` seconds. User and password, or a token,
    stand in `url`; TLS is not spoken. Raises NoAnswerError.
    """
    server = urlsplit(url if "://" in url else f"nats://{url}")
    deadline = monotonic() + deadline_s
    address = address_of(url)
    greeted = False
    try:
        with (
            socket.create_connection(
                (server.hostname or "127.0.0.1", server.port or DEFAULT_PORT), deadline_s
            ) as sock,
            sock.makefile("rb") as stream,
        ):
            _greet(sock, stream, server, subject)
            greeted = True
            while (left_s := deadline - monotonic()) > 0:
                sock.settimeout(left_s)
                line = stream.readline()
                match line.split():
                    case [b"MSG", *_, size]:
                        yield _payload(stream, int(size))
                    case [b"HMSG", *_, head_size, size]:
                        whole = _payload(stream, int(size))
                        if whole.startswith(NO_RESPONDERS):
                            return
                        yield whole[int(head_size) :]
                    case [b"PING"]:
                        sock.sendall(b"PONG\r\n")
                    case [b"-ERR", *_]:
                        raise NoAnswerError(_refusal(address, line))
                    case []:
                        raise NoAnswerError(
                            f"the NATS server at {address} has closed the connection; see its log"
                        )
    except TimeoutError:
        if not greeted:
            raise NoAnswerError(
                f"the NATS server at {address} says nothing within {deadline_s:g} s; see its log"
            ) from None
    except (OSError, ValueError) as error:
        raise NoAnswerError(
            f"no NATS server at {address} ({error}); start it, or point --nats or PRISM_NATS_URL at it"
        ) from error


def address_of(url: str) -> str:
    """Where `url` leads, without the credentials in it."""
    return url.rpartition("://")[2].rpartition("@")[2]


def _greet(sock: socket.socket, stream: BinaryIO, server: SplitResult, subject: str) -> None:
    greeting = stream.readline()
    if not greeting.startswith(b"INFO "):
        raise ValueError(f"it says {greeting[:40]!r} instead of INFO")
    if json.loads(greeting[5:]).get("tls_required"):
        raise ValueError("it wants TLS, which is not spoken here")
    options: dict[str, object] = {"verbose": False, "pedantic": False, "protocol": 1}
    options |= {
        "lang": "python",
        "version": "0",
        "name": "prism health",
        "headers": True,
        "no_responders": True,
    }
    if server.username and server.password:
        options |= {"user": server.username, "pass": server.password}
    elif server.username:
        options["auth_token"] = server.username
    inbox = f"_INBOX.{os.urandom(12).hex()}"
    sock.sendall(
        f"CONNECT {json.dumps(options)}\r\nSUB {inbox} 1\r\nPUB {subject} {inbox} 0\r\n\r\n".encode()
    )


def _payload(stream: BinaryIO, size: int) -> bytes:
    return stream.read(size + 2)[:size]


def _refusal(address: str, line: bytes) -> str:
    reason = line.decode(errors="replace").removeprefix("-ERR").strip().strip("'")
    return f"the NATS server at {address} refuses: {reason}; --nats or PRISM_NATS_URL takes user and password"
