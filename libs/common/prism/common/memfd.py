"""Anonymous shared memory that travels as a file descriptor, and Unix messages that carry it."""

import contextlib
import fcntl
import mmap
import os
import socket
from collections.abc import Iterator

# No message of the store's protocol comes near this; larger things travel in a memfd.
MAX_DATAGRAM = 64 * 1024
_MAX_FDS = 4


def create_memfd(name: str, nbytes: int) -> int:
    """A new memfd of `nbytes` zero bytes, closed on exec. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal_size(fd: int) -> bool:
    """Fix the size of a memfd for ever; False if its maker did not allow sealing."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        return False
    return True


def memfd_of(name: str, payload: bytes) -> int:
    """A memfd that holds `payload`."""
    fd = create_memfd(name, len(payload))
    try:
        written = 0
        while written < len(payload):
            written += os.pwrite(fd, memoryview(payload)[written:], written)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_memfd(fd: int, nbytes: int) -> bytes:
    """The first `nbytes` bytes, or fewer if it holds fewer."""
    parts = []
    offset = 0
    while offset < nbytes and (part := os.pread(fd, nbytes - offset, offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


@contextlib.contextmanager
def mapped(fd: int, nbytes: int, *, write: bool = False) -> Iterator[memoryview]:
    """The memory of a memfd (or a file), mapped for the length of the `with`; huge pages where allowed."""
    if nbytes == 0:
        yield memoryview(b"")
        return
    access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    with mmap.mmap(fd, nbytes, mmap.MAP_SHARED, access) as mapping:
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(mapping) as view:
            yield view


def send_with_fds(sock: socket.socket, payload: bytes, fds: list[int]) -> None:
    """Send one datagram with descriptors beside it. The sender keeps its own copies."""
    if fds:
        socket.send_fds(sock, [payload], fds)
    else:
        sock.send(payload)


def recv_with_fds(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One datagram and the descriptors beside it, which are the receiver's to close; empty when the peer
    has gone. Raises OSError, also for a datagram that is too large."""
    payload, fds, flags, _ = socket.recv_fds(sock, MAX_DATAGRAM, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise OSError(f"a message of more than {MAX_DATAGRAM} bytes or {_MAX_FDS} descriptors")
    return payload, fds


def close_all(fds: list[int]) -> None:
    """Close descriptors, whatever the fate of each."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
