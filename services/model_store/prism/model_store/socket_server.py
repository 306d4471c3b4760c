"""The store's Unix socket: each connection carries one request, and is the lease while it stays open."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from prism.common.errors import ErrorBody, ErrorCode, PrismError, words_of
from prism.common.memfd import close_all, memfd_of, read_memfd, recv_with_fds, send_with_fds
from prism.common.messages.codec import decode, encode, names_in
from prism.common.messages.store import (
    Deposited,
    DepositRequest,
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
from prism.common.store_client import wait_readable
from prism.common.telemetry import about
from prism.model_store.images import ImageKey
from prism.model_store.sole_store import unusable
from prism.model_store.store import ModelStore

log = logging.getLogger(__name__)

ACCEPT_AGAIN_S = 1.0
REQUEST_DEADLINE_S = 10.0
SEND_DEADLINE_S = 10.0
BACKLOG = 512
# struct sockaddr_un holds 108 bytes, the final zero included.
MAX_SOCKET_PATH = 107


class _PeerGoneError(Exception):
    """An answer could not be sent."""


@contextlib.asynccontextmanager
async def serve_socket(store: ModelStore, path: Path) -> AsyncIterator[None]:
    """Serve `store` on the socket `path` until the end of the `async with`, which ends all leases.

    Raises PrismError(store_unavailable) when another store answers there, or the path can't be bound.
    """
    listener = _listen(path)
    bound = os.stat(path).st_ino
    connections: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    again: asyncio.TimerHandle | None = None

    def on_connection() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # It is there still, and would be told of again at once.
                log.error("a connection could not be accepted, next try in %g s: %s", ACCEPT_AGAIN_S, error)
                pause()
                return
            sock.setblocking(False)
            task = loop.create_task(_serve(store, sock), name="store connection")
            connections.add(task)
            task.add_done_callback(connections.discard)

    def listen() -> None:
        loop.add_reader(listener.fileno(), on_connection)

    def pause() -> None:
        nonlocal again
        loop.remove_reader(listener.fileno())
        again = loop.call_later(ACCEPT_AGAIN_S, listen)

    listen()
    try:
        yield
    finally:
        if again is not None:
            again.cancel()
        loop.remove_reader(listener.fileno())
        with contextlib.suppress(OSError):
            # A store that replaced this one has put its own socket there.
            if os.stat(path).st_ino == bound:
                os.unlink(path)
        listener.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise unusable(path, f"a socket's path has at most {MAX_SOCKET_PATH} bytes")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        _remove_stale(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        sock.bind(str(path))
        # Whoever may connect can read all weights and add images: the owner and the group only.
        path.chmod(0o660)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise unusable(path, str(error)) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            log.info("replacing the socket %s of a store that is gone", path)
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            # Its backlog is full: somebody listens.
            pass
    raise unusable(path, "another model store answers there; one a node is enough")


async def _serve(store: ModelStore, sock: socket.socket) -> None:
    """Answer one connection, to its end."""
    with sock:
        try:
            async with asyncio.timeout(REQUEST_DEADLINE_S):
                await wait_readable(sock)
            payload, fds = recv_with_fds(sock)
        except (OSError, TimeoutError) as error:
            log.debug("a connection ended without a request: %s", error)
            return
        if not payload:
            close_all(fds)
            return
        # A peer that goes away ends whatever is done for it, so its going is watched all the time.
        work = asyncio.create_task(_answer(store, sock, payload, fds))
        gone = asyncio.create_task(_until_gone(sock))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _until_gone(sock: socket.socket) -> None:
    while True:
        await wait_readable(sock)
        try:
            payload, fds = recv_with_fds(sock)
        except BlockingIOError:
            continue
        except OSError:
            return
        close_all(fds)
        if not payload:
            return


async def _answer(store: ModelStore, sock: socket.socket, payload: bytes, fds: list[int]) -> None:
    names = about(**names_in(payload))
    try:
        with contextlib.ExitStack() as unused:
            unused.callback(lambda: close_all(fds))
            request: StoreRequest = decode(payload, StoreRequest)  # type: ignore[arg-type]
            if isinstance(request, DepositRequest):
                await _take_in(store, sock, request, fds)
            elif isinstance(request, RoomRequest):
                await _keep_room(store, sock, request)
            else:
                await _lend(store, sock, request)
    except PrismError as error:
        # Whoever asked tells: it fails, or does without.
        log.info("request refused: %s", error, extra=names)
        await _send_failure(sock, error.body)
    except _PeerGoneError as error:
        log.info("connection lost: %s", error, extra=names)
    except OSError as error:
        log.error("request failed, this node can't do it now: %s", error, extra=names)
        await _send_failure(sock, ErrorBody(ErrorCode.INTERNAL, f"the model store failed: {words_of(error)}"))
    except Exception as error:
        log.exception("request failed: a fault of the store, please report it", extra=names)
        await _send_failure(sock, ErrorBody(ErrorCode.INTERNAL, f"the model store failed: {error!r}"))


async def _lend(store: ModelStore, sock: socket.socket, request: LeaseRequest) -> None:
    def on_progress(done: int, total: int) -> None:
        # Progress is not worth waiting for: a peer that does not read misses some.
        with contextlib.suppress(OSError):
            sock.send(encode(StageProgress(done, total)))

    async with store.lend(
        request.model, request.model_path, request.layout, on_progress, request.version
    ) as lent:
        manifest = encode(lent.manifest)
        manifest_fd = memfd_of("prism-manifest", manifest)
        try:
            granted = LeaseGranted(lent.image.kind, lent.image.nbytes, len(manifest), lent.seconds)
            await _send(sock, granted, [lent.image.fd, manifest_fd])
        finally:
            os.close(manifest_fd)
        # The lease: it ends when the peer goes, which cancels this.
        await asyncio.get_running_loop().create_future()


async def _keep_room(store: ModelStore, sock: socket.socket, request: RoomRequest) -> None:
    key = ImageKey(request.fingerprint, request.layout)
    async with store.rooms.keep(request.model, key, request.nbytes) as name:
        await _send(sock, RoomGranted(name), [])
        # As with a lease: it ends when the peer goes.
        await asyncio.get_running_loop().create_future()


async def _take_in(store: ModelStore, sock: socket.socket, request: DepositRequest, fds: list[int]) -> None:
    if len(fds) != 2:
        raise PrismError(
            ErrorCode.BAD_MESSAGE, f"a deposit brings two descriptors, image and manifest, not {len(fds)}"
        )
    manifest = decode(read_memfd(fds[1], request.manifest_bytes), ImageManifest)
    content_hash = await store.deposit(request.model, manifest, os.dup(fds[0]), request.room)
    await _send(sock, Deposited(content_hash), [])


async def _send(sock: socket.socket, reply: StoreReply, fds: list[int]) -> None:
    """Send the answer, with descriptors beside it. Raises _PeerGoneError."""
    payload = encode(reply)
    try:
        async with asyncio.timeout(SEND_DEADLINE_S):
            while True:
                try:
                    send_with_fds(sock, payload, fds)
                except BlockingIOError:
                    await _writable(sock)
                else:
                    return
    except OSError as error:
        raise _PeerGoneError(words_of(error)) from error


async def _send_failure(sock: socket.socket, error: ErrorBody) -> None:
    with contextlib.suppress(_PeerGoneError):
        await _send(sock, StoreFailure(error), [])


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()

    def on_writable() -> None:
        if not writable.done():
            writable.set_result(None)

    loop.add_writer(sock.fileno(), on_writable)
    try:
        await writable
    finally:
        loop.remove_writer(sock.fileno())
