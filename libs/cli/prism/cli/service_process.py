"""One service as a process that is kept running: its output handed on, started again, drained at the end."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence

STOP_DEADLINE_S = 45.0
KILL_DEADLINE_S = 5.0
RESTART_DELAY_S = 1.0
EARLY_S = 3.0
LONGEST_LINE_BYTES = 1 << 20


class ServiceProcess:
    """One service: started again when it dies unasked, its output handed on line by line.

    `kind` is the service, `name` this process of it: the second gateway is `gateway-2`. It gets the file
    descriptors `inherited`; `in_child` runs in the new process before `command` does. `failed` says why the
    service cannot run, once it turns out that it cannot.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        on_line: Callable[[str, str], None],
        inherited: Sequence[int] = (),
        in_child: Callable[[], None] | None = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._command = tuple(command)
        self._environment = environment
        self._on_line = on_line
        self._inherited = tuple(inherited)
        self._in_child = in_child
        self._end_by: signal.Signals | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process, and keep it running from now on."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def _spawn(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **self._environment, "PRISM_PARENT_PID": str(os.getpid())},
            start_new_session=True,
            pass_fds=self._inherited,
            limit=LONGEST_LINE_BYTES,
            preexec_fn=self._in_child,
        )
        if self._end_by is not None:
            # Whoever asked for the end saw no process, or the one before.
            self._signal(self._end_by)

    def _signal(self, signum: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signum)

    async def _keep(self) -> None:
        try:
            await self._keep_running()
        except Exception as error:
            # Its output is read no more either, and it would wait for that once the pipe is full.
            self.kill()
            self._fail(f"{self.name} could not be kept running, please report it: {error!r}")

    async def _keep_running(self) -> None:
        while True:
            assert self.process is not None
            began = time.monotonic()
            await self._read(self.process)
            status = await self.process.wait()
            if self._end_by is not None:
                return
            if time.monotonic() - began < EARLY_S and status > 0:
                self._fail(f"{self.name} ended at once with status {status}; see its log above")
                return
            self._on_line(self.name, f"ended with status {status}, started again")
            await asyncio.sleep(RESTART_DELAY_S)
            if self._end_by is not None:
                return
            try:
                await self._spawn()
            except OSError as error:
                self._fail(f"{self.name} ended and could not be started again: {error}")
                return

    def _fail(self, why: str) -> None:
        if not self.failed.done():
            self.failed.set_result(why)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                # Longer than the limit: readline has dropped it, and goes on behind it.
                line = b"(a line too long to show)\n"
            if not line:
                return
            self._on_line(self.name, line.decode(errors="replace").rstrip())

    async def stop(self, deadline_s: float = STOP_DEADLINE_S) -> None:
        """Drain and end, not to be started again; killed when it takes longer than it may."""
        self._end_by = self._end_by or signal.SIGTERM
        process = self.process
        if process is not None and process.returncode is None:
            process.send_signal(self._end_by)
            try:
                async with asyncio.timeout(deadline_s):
                    await process.wait()
            except TimeoutError:
                self._on_line(self.name, f"did not end within {deadline_s:g} s, killed")
                self.kill()
        if self._keeper is not None:
            try:
                async with asyncio.timeout(KILL_DEADLINE_S):
                    await self._keeper
            except TimeoutError:
                self._on_line(self.name, "left a child that holds its output open")

    def kill(self) -> None:
        """End it now."""
        self._end_by = signal.SIGKILL
        self._signal(signal.SIGKILL)
