"""The engine's end of the socket to its worker: blocking sends, non-blocking looks, safe from two threads."""

import select
import socket
import threading

from prism.gpu_worker.engine_protocol import FromEngine, MessageBuffer, ToEngine, pack, unpack_to_engine

RECEIVE_BYTES = 1 << 20


class WorkerGone(Exception):
    """The worker closed its end: the engine has nobody to serve."""


class EngineLink:
    """Messages of the worker in, messages to it out."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = MessageBuffer()
        self._pending: list[ToEngine] = []
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For pollers."""
        return self._socket.fileno()

    def send(self, message: FromEngine) -> None:
        """Send `message`; waits while the worker is behind. Raises WorkerGone."""
        with self._sending:
            try:
                self._socket.sendall(pack(message))
            except OSError as error:
                raise WorkerGone from error

    def receive(self) -> ToEngine:
        """The next message, waited for (the worker bounds the wait: it ends us). Raises WorkerGone."""
        while not self._pending:
            self._take(self._read(0))
        return self._pending.pop(0)

    def wait(self) -> None:
        """Sleep until the worker says something, or is gone."""
        if not self._pending:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            poller.poll()

    def receive_waiting(self) -> list[ToEngine]:
        """All messages that are there already. Raises WorkerGone."""
        while True:
            try:
                self._take(self._read(socket.MSG_DONTWAIT))
            except BlockingIOError:
                break
        messages, self._pending = self._pending, []
        return messages

    def _read(self, flags: int) -> bytes:
        try:
            return self._socket.recv(RECEIVE_BYTES, flags)
        except ConnectionError as error:
            raise WorkerGone from error

    def _take(self, data: bytes) -> None:
        if not data:
            raise WorkerGone
        self._pending += [unpack_to_engine(body) for body in self._buffer.feed(data)]
