"""Borrowing images from a node's model store, and giving it new ones, by calls that block: for engines."""

import asyncio
import contextlib
import os
import select
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from prism.common.errors import ErrorCode, PrismError
from prism.common.memfd import close_all, memfd_of, read_memfd, recv_with_fds, send_with_fds
from prism.common.messages.codec import decode, encode
from prism.common.messages.store import (
    Deposited,
    DepositRequest,
    ImageKind,
    ImageManifest,
    LeaseGranted,
    LeaseRequest,
    RoomGranted,
    RoomRequest,
    StageProgress,
    StoreFailure,
    StoreReply,
    StoreRequest,
)

# Called with the bytes staged so far, and in all.
OnProgress = Callable[[int, int], None]


def default_socket_path() -> Path:
    """Where a node's store listens unless told otherwise (PRISM_STORE_SOCKET)."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(runtime) / f"prism-store-{os.getuid()}.sock"


class Lease:
    """An image on loan: it stays in the store's memory until `close`, or the end of the `with`.

    `fd` is the image's memfd, to be mapped shared and only read; it is closed with the lease, but mappings
    made of it stay valid. `seconds` is the time that the store spent staging, 0 if the image was there.
    """

    def __init__(self, sock: socket.socket, fd: int, manifest: ImageManifest, granted: LeaseGranted) -> None:
        self._sock = sock
        self.fd = fd
        self.manifest = manifest
        self.kind: ImageKind = granted.kind
        self.nbytes: int = granted.nbytes
        self.seconds: float = granted.seconds

    def close(self) -> None:
        """Give the image back. Closing twice does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._sock.close()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def lease(
    socket_path: Path | str,
    request: LeaseRequest,
    deadline_s: float,
    on_progress: OnProgress | None = None,
) -> Lease:
    """Have a model's image staged if need be, and borrow it.

    Raises PrismError: store_unavailable (retry) when the store is not there or goes away meanwhile,
    deadline_exceeded after `deadline_s` seconds, else what the store reports.
    """
    path, deadline = Path(socket_path), _Deadline(deadline_s)
    with contextlib.ExitStack() as on_error:
        sock = on_error.enter_context(_connected(path))
        _send(sock, path, encode(request), [])
        while True:
            payload, fds = _receive(sock, deadline)
            with contextlib.ExitStack() as unused:
                unused.callback(close_all, fds)
                reply = _reply(payload, path)
                if isinstance(reply, StageProgress):
                    if on_progress:
                        on_progress(reply.done_bytes, reply.total_bytes)
                    continue
                if not isinstance(reply, LeaseGranted) or len(fds) != 2:
                    raise _unexpected(reply, path)
                image_fd, manifest_fd = fds
                manifest = decode(read_memfd(manifest_fd, reply.manifest_bytes), ImageManifest)
                os.close(manifest_fd)
                unused.pop_all()
                on_error.pop_all()
                return Lease(sock, image_fd, manifest, reply)


@contextlib.contextmanager
def room(socket_path: Path | str, request: RoomRequest, deadline_s: float) -> Iterator[str]:
    """Have the store keep room for an image within the `with`, and the image once it is deposited; yields
    what `deposit` is to be told. What nobody borrows makes room for it, the model's checkpoint first.

    Raises as `lease` does, out_of_memory (retry) when leases leave too little.
    """
    path, deadline = Path(socket_path), _Deadline(deadline_s)
    with _connected(path) as sock:
        reply = _asked(sock, path, request, [], deadline)
        if not isinstance(reply, RoomGranted):
            raise _unexpected(reply, path)
        yield reply.room


def deposit(
    socket_path: Path | str,
    model: str,
    manifest: ImageManifest,
    image_fd: int,
    deadline_s: float,
    granted_room: str = "",
) -> str:
    """Give the store an image in an engine's layout to keep, in the room that `room` got for it; returns its
    content hash. Without, it is kept in memory if there is room when it comes.

    `image_fd` stays the caller's, its bytes must not change any more. Make it with
    `prism.common.memfd.create_memfd`, so that the store can fix its size. Raises as `lease` does.
    """
    path, deadline = Path(socket_path), _Deadline(deadline_s)
    written = encode(manifest)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_connected(path))
        manifest_fd = memfd_of("prism-manifest", written)
        stack.callback(os.close, manifest_fd)
        request = DepositRequest(model, len(written), granted_room)
        reply = _asked(sock, path, request, [image_fd, manifest_fd], deadline)
        if not isinstance(reply, Deposited):
            raise _unexpected(reply, path)
        return reply.content_hash


class _Deadline:
    """When patience ends, `seconds` after this was made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._at = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._at - time.monotonic()


def _connected(socket_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Never waits: the kernel connects at once, or refuses when the store's backlog is full.
        sock.setblocking(False)
        sock.connect(str(socket_path))
    except OSError as error:
        sock.close()
        raise _unavailable(socket_path, str(error)) from error
    return sock


def _send(sock: socket.socket, socket_path: Path, payload: bytes, fds: list[int]) -> None:
    try:
        send_with_fds(sock, payload, fds)
    except OSError as error:
        raise _unavailable(socket_path, str(error)) from error


def _asked(
    sock: socket.socket, path: Path, request: StoreRequest, fds: list[int], deadline: _Deadline
) -> StoreReply:
    """The answer to a request that is answered once, without descriptors."""
    _send(sock, path, encode(request), fds)
    payload, unwanted = _receive(sock, deadline)
    close_all(unwanted)
    return _reply(payload, path)


def _receive(sock: socket.socket, deadline: _Deadline) -> tuple[bytes, list[int]]:
    """The next message and the descriptors that came with it; nothing when the store has hung up."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        try:
            return recv_with_fds(sock)
        except BlockingIOError:
            left_s = deadline.left_s
            if left_s <= 0 or not poll.poll(left_s * 1000):
                raise _too_late(deadline.seconds) from None
        except ConnectionError:
            return b"", []


def _reply(payload: bytes, socket_path: Path) -> StoreReply:
    if not payload:
        raise _unavailable(socket_path, "it closed the connection")
    reply: StoreReply = decode(payload, StoreReply)  # type: ignore[arg-type]
    if isinstance(reply, StoreFailure):
        raise PrismError.from_body(reply.error)
    return reply


async def wait_readable(sock: socket.socket) -> None:
    """Wait until `sock` has something to receive, or its peer has gone. One waiter a socket."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock.fileno(), on_readable)
    try:
        await readable
    finally:
        loop.remove_reader(sock.fileno())


def _unavailable(socket_path: Path, why: str) -> PrismError:
    return PrismError(
        ErrorCode.STORE_UNAVAILABLE,
        f"no model store at {socket_path}: {why}; is prism.model_store running on this node?",
        retry=True,
    )


def _too_late(deadline_s: float) -> PrismError:
    return PrismError(
        ErrorCode.DEADLINE_EXCEEDED, f"the model store did not finish within {deadline_s:.1f} s", retry=True
    )


def _unexpected(reply: StoreReply, socket_path: Path) -> PrismError:
    return PrismError(
        ErrorCode.BAD_MESSAGE,
        f"the model store at {socket_path} answered with {type(reply).__name__}: is it of the same version?",
    )
