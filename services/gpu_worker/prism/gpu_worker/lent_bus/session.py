"""A lender's side of one engine: its image, pinned here too, and the parts of it that are carried."""

import contextlib
import logging
import os
import queue
import socket
import threading
from dataclasses import dataclass
from typing import Any

from prism.common.errors import PrismError
from prism.common.memfd import close_all, recv_with_fds
from prism.common.messages.codec import decode, encode
from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.registered_image import RegisteredImage
from prism.gpu_worker.lent_bus.messages import Begin, Begun, Carried, Carry, End, Failed, Take, ToLender

log = logging.getLogger(__name__)


class Bus:
    """One GPU's bus: its worker's own, an engine's, or nobody's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = 0
        self._borrower: object | None = None

    def keep(self) -> None:
        """The worker needs it: nobody new gets it. Who has it goes on."""
        with self._lock:
            self._kept += 1

    def spare(self) -> None:
        """The worker does not need it any more."""
        with self._lock:
            self._kept -= 1

    def borrow(self, borrower: object) -> bool:
        """Whether `borrower` has it now."""
        with self._lock:
            if self._kept or self._borrower not in (None, borrower):
                return False
            self._borrower = borrower
            return True

    def give_back(self, borrower: object) -> None:
        """`borrower` does not have it any more."""
        with self._lock:
            if self._borrower is borrower:
                self._borrower = None


@dataclass
class _Target:
    """GPU memory of the engine's, mapped here."""

    address: int
    nbytes: int
    handle: Any
    left: int


class Session:
    """Serves one connection, by the thread that calls `run` and one that waits for copies."""

    def __init__(self, sock: socket.socket, bus: Bus, context: Any) -> None:
        self._sock = sock
        self._bus = bus
        self._context = context
        self._image: RegisteredImage | None = None
        self._stream: Any = None
        self._copies: queue.SimpleQueue[tuple[Any, _Target] | None] = queue.SimpleQueue()
        self._carried = 0

    def run(self) -> None:
        """Do what the engine asks until it is gone; nothing of it is left then."""
        cuda_driver.use_context(self._context)
        self._stream = cuda_driver.create_stream()
        waiting = threading.Thread(target=self._wait_for_copies, name="carried", daemon=True)
        waiting.start()
        try:
            self._serve()
        except (OSError, PrismError) as error:
            log.warning("a bus is lent no longer: %s", error)
            self._tell(Failed(str(error)))
        finally:
            self._copies.put(None)
            waiting.join()
            self._bus.give_back(self)
            if self._image is not None:
                self._image.close()
            cuda_driver.destroy_stream(self._stream)
            self._sock.close()

    def hang_up(self) -> None:
        """Have `run` come to its end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            payload, fds = recv_with_fds(self._sock)
            if not payload:
                return
            try:
                message: ToLender = decode(payload, ToLender)  # type: ignore[arg-type]
                match message:
                    case Take():
                        self._take(fds, message.nbytes)
                    case Begin():
                        self._carried = 0
                        self._tell(Begun(self._image_is_pinned() and self._bus.borrow(self)))
                    case Carry():
                        self._carry(fds, message)
                    case End():
                        self._bus.give_back(self)
            finally:
                close_all(fds)

    def _take(self, fds: list[int], nbytes: int) -> None:
        (fd,) = fds
        known, self._image = self._image, None
        if known is not None and (known.inode != os.fstat(fd).st_ino or known.nbytes != nbytes):
            known.close()
            known = None
        self._image = known or RegisteredImage(fd, nbytes)
        self._image.pin_behind()

    def _image_is_pinned(self) -> bool:
        return self._image is not None and self._image.pinned_bytes == self._image.nbytes

    def _carry(self, fds: list[int], message: Carry) -> None:
        (fd,) = fds
        image = self._image
        assert image is not None
        address, handle = cuda_driver.map_imported(0, fd, message.nbytes)
        target = _Target(address, message.nbytes, handle, len(message.parts))
        for offset, size in message.parts:
            begin = address + offset - message.base
            cuda_driver.copy_to_device(begin, image.address + offset, size, self._stream)
            event = cuda_driver.create_event()
            cuda_driver.record_event(event, self._stream)
            self._copies.put((event, target))

    def _wait_for_copies(self) -> None:
        cuda_driver.use_context(self._context)
        while (copy := self._copies.get()) is not None:
            event, target = copy
            try:
                cuda_driver.wait_for_event(event)
                cuda_driver.destroy_event(event)
                target.left -= 1
                if not target.left:
                    cuda_driver.unmap_imported(target.address, target.nbytes, target.handle)
            except PrismError as error:
                self._tell(Failed(str(error)))
                continue
            self._carried += 1
            self._tell(Carried(self._carried))

    def _tell(self, message: Begun | Carried | Failed) -> None:
        # Who is gone is noticed by whoever receives.
        with contextlib.suppress(OSError):
            self._sock.send(encode(message))
