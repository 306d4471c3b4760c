"""Warm shells: processes that are started and imported, and become an engine when given a model.

This is the worker's side: `ForkServerShells` keeps the fork server of `fork_server.py` running and takes
shells from it.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec

from prism.common.errors import ErrorCode, PrismError

log = logging.getLogger(__name__)

IMPORT_DEADLINE_S = 180.0
FORK_DEADLINE_S = 20.0
EXIT_DEADLINE_S = 10.0


class ForkServerReply(msgspec.Struct, frozen=True, array_like=True):
    """What the fork server says: ready, spawned (pid, or 0 and why not, for the spawn of that number),
    exited (pid, how)."""

    kind: str
    pid: int = 0
    how: str = ""
    spawn: int = 0


def encode_reply(reply: ForkServerReply) -> bytes:
    """A reply as one datagram."""
    return msgspec.msgpack.encode(reply)


def decode_exit(status: int) -> str:
    """How a process ended, in words, from its wait status."""
    return exit_words(os.waitstatus_to_exitcode(status))


def exit_words(code: int) -> str:
    """How a process ended, in words, from its exit code; that of a signal is negative."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


class Shell:
    """A process that waits to become an engine: its pid, our end of its socket, and its end.

    `exited` says how it ended; from then on the pid may be somebody else's. `gone` is set once nothing is
    left of the processes of its other ranks either, and all that they held is free.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.connection = connection
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(self, how: str) -> None:
        """It is gone, and had no other ranks, or these with it."""
        if not self.exited.done():
            self.exited.set_result(how)
        if not self.gone.done():
            self.gone.set_result(None)


class ShellSource(Protocol):
    """Where a device's shells come from."""

    @property
    def ready(self) -> bool:
        """Whether `take` would not have to wait for anything but the shell itself."""
        ...

    async def take(self) -> Shell:
        """A shell, ready to become an engine. Raises PrismError when none can be had."""


class ForkServerShells:
    """Shells forked from a process that has imported SGLang. Made by `fork_server_shells`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._spawns: dict[int, asyncio.Future[ForkServerReply]] = {}
        self._next_spawn = 0
        self._shells: dict[int, Shell] = {}
        self._early_exits: dict[int, str] = {}
        self._taking = asyncio.Lock()

    @property
    def ready(self) -> bool:
        """Whether the import is done."""
        return self._ready.is_set()

    def start(self) -> None:
        """Start importing; returns at once."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["OMP_NUM_THREADS"] = "1"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prism.gpu_worker.fork_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._control = ours
        self._ready.clear()
        self._reader = asyncio.create_task(self._read(ours), name="fork server replies")

    @property
    def alive(self) -> bool:
        """Whether the fork server runs."""
        return self._process is not None and self._process.poll() is None

    async def take(self) -> Shell:
        """Fork a shell. Raises PrismError(internal) when the fork server does not answer."""
        async with self._taking:
            if not self.alive:
                log.error("the fork server is gone, starting it again; its engines ended with it")
                await self.stop()
                self.start()
            try:
                async with asyncio.timeout(IMPORT_DEADLINE_S):
                    await self._ready.wait()
                if not self.alive:
                    raise PrismError(ErrorCode.INTERNAL, "the fork server ended; see its log", retry=True)
                return await self._fork()
            except TimeoutError as error:
                raise PrismError(
                    ErrorCode.INTERNAL, "the fork server did not answer in time", retry=True
                ) from error

    async def _fork(self) -> Shell:
        assert self._control is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._next_spawn += 1
        number = self._next_spawn
        spawned: asyncio.Future[ForkServerReply] = asyncio.get_running_loop().create_future()
        self._spawns[number] = spawned
        try:
            with theirs:
                socket.send_fds(self._control, [str(number).encode()], [theirs.fileno()])
            async with asyncio.timeout(FORK_DEADLINE_S):
                reply = await spawned
            if not reply.pid:
                raise PrismError(ErrorCode.INTERNAL, f"no shell: {reply.how}", retry=True)
        except BaseException as error:
            # A shell that comes all the same finds its socket closed, and ends.
            ours.close()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise PrismError(ErrorCode.INTERNAL, f"fork server: {error}", retry=True) from error
            raise
        finally:
            del self._spawns[number]
        pid = reply.pid
        shell = Shell(pid, ours)
        if pid in self._early_exits:
            shell.ended(self._early_exits.pop(pid))
        else:
            self._shells[pid] = shell
        return shell

    async def _read(self, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(control, 4096)
            except OSError:
                data = b""
            if not data:
                break
            reply = msgspec.msgpack.decode(data, type=ForkServerReply)
            if reply.kind == "ready":
                self._ready.set()
            elif reply.kind == "spawned":
                self._answer(reply)
            else:
                self._exited(reply.pid, reply.how)
        # Shells die with their fork server.
        for pid in list(self._shells):
            self._exited(pid, "ended with the fork server")
        for number in list(self._spawns):
            self._answer(ForkServerReply("spawned", 0, "the fork server ended", number))
        # Whoever waits for it to be ready shall see that it never will be.
        self._ready.set()

    def _answer(self, reply: ForkServerReply) -> None:
        waiting = self._spawns.get(reply.spawn)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def _exited(self, pid: int, how: str) -> None:
        shell = self._shells.pop(pid, None)
        if shell is None:
            self._early_exits[pid] = how
        else:
            shell.ended(how)

    async def stop(self) -> None:
        """End the fork server, and with it whatever it forked."""
        if self._control is not None:
            self._control.shutdown(socket.SHUT_RDWR)
        if self._reader is not None:
            await self._reader
        if self._control is not None:
            self._control.close()
            self._control = None
        process, self._process = self._process, None
        if process is not None:
            if not self._ready.is_set():
                # It would look at its socket only once it has imported everything.
                process.kill()
            await asyncio.to_thread(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(EXIT_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@asynccontextmanager
async def fork_server_shells() -> AsyncIterator[ForkServerShells]:
    """A running fork server (still importing when this returns), ended at the end."""
    shells = ForkServerShells()
    shells.start()
    try:
        yield shells
    finally:
        await shells.stop()
