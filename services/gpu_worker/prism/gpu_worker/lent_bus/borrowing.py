"""An engine's side: the buses of the node's other GPUs, and parts of its weights that they carry."""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from prism.common.errors import ErrorCode, PrismError, words_of
from prism.common.memfd import recv_with_fds, send_with_fds
from prism.common.messages.codec import decode, encode
from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.lent_bus.messages import (
    Begin,
    Begun,
    Carried,
    Carry,
    End,
    Failed,
    FromLender,
    Take,
    ToLender,
)

log = logging.getLogger(__name__)

ANSWER_DEADLINE_S = 0.05
PART_DEADLINE_S = 5.0

CopyPart = Callable[[int, int], None]
"""Copies a part of the image, an offset and a size, through the engine's own bus; done when it returns."""


class Buses:
    """Those that are lent in `folder`, but for those of the GPUs in `own`, by UUID.

    A bus that fails is done without: from then on until the image is offered again.
    """

    def __init__(self, folder: Path, own: Collection[str]) -> None:
        self._folder = folder
        self._own = set(own)
        self._lenders: dict[str, Lender] = {}

    def offer(self, fd: int, nbytes: int) -> None:
        """Have the image behind `fd` pinned by every lender that there is, for the next wake."""
        for path in sorted(self._folder.glob("*")):
            if path.name in self._own:
                continue
            lender = self._lenders.get(path.name)
            if lender is None or lender.lost:
                with contextlib.suppress(OSError):
                    lender = self._lenders[path.name] = Lender(path)
            if lender is not None:
                lender.take(fd, nbytes)

    def borrow(self) -> "list[Turn]":
        """Turns on the buses that can be had now."""
        # All are asked before any has answered.
        asked = [lender for lender in self._lenders.values() if lender.ask()]
        return [Turn(lender) for lender in asked if lender.granted()]

    def close(self) -> None:
        """Let go of them all."""
        for lender in self._lenders.values():
            lender.close()
        self._lenders.clear()


class Lender:
    """The connection to one lender. Whatever fails on it makes it `lost`."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.lost = False
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._sock.setblocking(False)
            self._sock.connect(str(path))
        except OSError:
            self._sock.close()
            raise

    def take(self, fd: int, nbytes: int) -> None:
        """Offer an image."""
        self.send(Take(nbytes), [fd])

    def ask(self) -> bool:
        """Ask for the bus; False when there is nobody to ask."""
        return not self.lost and self.send(Begin())

    def granted(self) -> bool:
        """What came of asking."""
        answer = self.receive(ANSWER_DEADLINE_S)
        return isinstance(answer, Begun) and answer.granted

    def send(self, message: ToLender, fds: Collection[int] = ()) -> bool:
        """Whether `message` went out."""
        try:
            # A lender that reads nothing for so long is none.
            self._sock.settimeout(PART_DEADLINE_S)
            send_with_fds(self._sock, encode(message), list(fds))
        except OSError as error:
            self.lose(str(error))
        return not self.lost

    def receive(self, deadline_s: float) -> FromLender | None:
        """The next message; None when there is none in time, and the lender is lost then."""
        try:
            self._sock.settimeout(deadline_s)
            payload, _ = recv_with_fds(self._sock)
            if payload:
                answer: FromLender = decode(payload, FromLender)  # type: ignore[arg-type]
                return answer
            self.lose("it hung up")
        except (OSError, PrismError) as error:
            self.lose(words_of(error))
        return None

    def lose(self, why: str) -> None:
        """Do without it."""
        if not self.lost:
            log.info("the bus of %s is not borrowed any more: %s", self.name, why)
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.lost = True
        self._sock.close()


class Turn:
    """One wake's use of a lent bus, which is its owner's again once all parts are there. Parts that the
    lender does not bring are copied by `copy`, so that they come in any case. `begin`, `carry`...,
    `all_sent`, then `finish` and `end`; parts count from 0."""

    def __init__(self, lender: Lender) -> None:
        self._lender = lender
        self._parts: list[tuple[int, int]] = []
        self._all_sent = threading.Event()
        self._arrived = threading.Condition()
        self._there = 0
        self._error: PrismError | None = None
        self._counter: int | None = None
        self._reading: threading.Thread | None = None
        self._copy: CopyPart | None = None
        self._context: Any = None

    def begin(self, copy: CopyPart) -> None:
        """Wait for parts, by a thread. The calling one has a context."""
        self._copy = copy
        self._context = cuda_driver.current_context()
        self._counter = cuda_driver.host_counter()
        self._reading = threading.Thread(target=self._read, name=f"bus {self._lender.name}", daemon=True)
        self._reading.start()

    def carry(self, handle: Any, base: int, nbytes: int, parts: list[tuple[int, int]]) -> None:
        """Have `parts` copied into the memory of `handle`, `nbytes` from `base` on."""
        try:
            with cuda_driver.exported(handle) as fd:
                self._lender.send(Carry(base, nbytes, parts), [fd])
        except PrismError as error:
            self._lender.lose(error.message)
        with self._arrived:
            self._parts += parts
            self._arrived.notify_all()

    def all_sent(self) -> None:
        """There will be no more parts."""
        self._all_sent.set()
        with self._arrived:
            self._arrived.notify_all()

    def hold_back(self, stream: int, part: int) -> None:
        """Have what is enqueued on the stream from here on begin once this part is there."""
        assert self._counter is not None
        cuda_driver.hold_until(stream, self._counter, part + 1)

    def wait(self, part: int) -> None:
        """Wait until it is there. Raises what its copy failed with."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._there > part or self._error is not None)
        if self._there <= part:
            assert self._error is not None
            raise self._error

    def finish(self) -> None:
        """Wait for what is under way."""
        self.all_sent()
        if self._reading is not None:
            self._reading.join()
        else:
            self._lender.send(End())

    def end(self) -> None:
        """Nobody waits on a stream any more."""
        counter, self._counter = self._counter, None
        if counter is not None:
            cuda_driver.free_counter(counter)

    def _read(self) -> None:
        cuda_driver.use_context(self._context)
        assert self._copy is not None
        try:
            while self._more():
                if not self._lender.lost:
                    answer = self._lender.receive(PART_DEADLINE_S)
                    if isinstance(answer, Carried):
                        self._reached(answer.parts)
                        continue
                    if isinstance(answer, Failed):
                        self._lender.lose(answer.reason)
                self._copy(*self._parts[self._there])
                self._reached(self._there + 1)
            self._lender.send(End())
        except BaseException as error:
            failed = PrismError(ErrorCode.INTERNAL, f"a part could not be copied: {error}", retry=True)
            if self._counter is not None:
                # What is held back for a part must not stay so: the process could not even end in order.
                cuda_driver.set_counter(self._counter, cuda_driver.MOST_COUNTED)
            with self._arrived:
                self._error = error if isinstance(error, PrismError) else failed
                self._arrived.notify_all()

    def _more(self) -> bool:
        """Whether a part is still to come, once that is known."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._there < len(self._parts) or self._all_sent.is_set())
            return self._there < len(self._parts)

    def _reached(self, parts: int) -> None:
        assert self._counter is not None
        cuda_driver.set_counter(self._counter, parts)
        with self._arrived:
            self._there = parts
            self._arrived.notify_all()
