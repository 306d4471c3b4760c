"""A lender's side of one engine: its image, pinned here too, and the parts of it that are carried."""

import contextlib
import logging
import os
import queue
import socket
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from prism.common.errors import PrismError
from prism.common.memfd import close_all, recv_with_fds
from prism.common.messages.codec import decode, encode
from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.engine.registered_image import RegisteredImage
from prism.gpu_worker.lent_bus.messages import Begin, Begun, Carried, Carry, End, Failed, Take, ToLender

log = logging.getLogger(__name__)

# The bus stays busy with two; memory of an engine that is gone is kept no longer than they take.
PARTS_UNDER_WAY = 2


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


@dataclass(frozen=True)
class _Carrying:
    """Parts that go into the engine's GPU memory, which is mapped here at `address`."""

    message: Carry
    address: int
    handle: Any
    image: RegisteredImage


class Session:
    """Serves one connection, by the thread that calls `run` and one that copies."""

    def __init__(self, sock: socket.socket, bus: Bus, context: Any) -> None:
        self._sock = sock
        self._bus = bus
        self._context = context
        self._image: RegisteredImage | None = None
        self._orders: queue.SimpleQueue[_Carrying | None] = queue.SimpleQueue()
        self._gone = threading.Event()
        self._carried = 0

    def run(self) -> None:
        """Do what the engine asks until it is gone; nothing of it is left then."""
        copying: threading.Thread | None = None
        try:
            cuda_driver.use_context(self._context)
            copying = threading.Thread(target=self._copy, name="copying", daemon=True)
            copying.start()
            self._serve()
        except (OSError, PrismError) as error:
            self._fail(error)
        finally:
            self._gone.set()
            self._orders.put(None)
            if copying is not None:
                copying.join()
            self._bus.give_back(self)
            self._sock.close()
            if self._image is not None:
                self._image.close()

    def hang_up(self) -> None:
        """Have `run` come to its end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _fail(self, error: Exception) -> None:
        if not self._gone.is_set():
            log.warning("a bus is lent no longer to one engine: %s", error)
        self._tell(Failed(str(error)))
        self.hang_up()

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
        assert self._image is not None
        address, handle = cuda_driver.map_imported(0, fd, message.nbytes)
        self._orders.put(_Carrying(message, address, handle, self._image))

    def _copy(self) -> None:
        """Carry out orders until there are no more. After a failure, or of an engine that is gone, they are
        dropped."""
        try:
            cuda_driver.use_context(self._context)
            stream = cuda_driver.create_stream()
            try:
                while (order := self._orders.get()) is not None:
                    try:
                        self._copy_parts(order, stream)
                    except PrismError as error:
                        self._fail(error)
                        self._gone.set()
                    finally:
                        cuda_driver.unmap_imported(order.address, order.message.nbytes, order.handle)
            finally:
                cuda_driver.destroy_stream(stream)
        except PrismError as error:
            self._fail(error)

    def _copy_parts(self, order: _Carrying, stream: Any) -> None:
        under_way: deque[Any] = deque()
        for offset, size in order.message.parts:
            if self._gone.is_set():
                break
            target = order.address + offset - order.message.base
            cuda_driver.copy_to_device(target, order.image.address + offset, size, stream)
            event = cuda_driver.create_event()
            cuda_driver.record_event(event, stream)
            under_way.append(event)
            if len(under_way) >= PARTS_UNDER_WAY:
                self._await(under_way.popleft())
        while under_way:
            self._await(under_way.popleft())

    def _await(self, event: Any) -> None:
        cuda_driver.wait_for_event(event)
        cuda_driver.destroy_event(event)
        self._carried += 1
        self._tell(Carried(self._carried))

    def _tell(self, message: Begun | Carried | Failed) -> None:
        # Who is gone is noticed by whoever receives.
        with contextlib.suppress(OSError):
            self._sock.send(encode(message))
