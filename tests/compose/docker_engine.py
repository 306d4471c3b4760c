"""The Docker engine: the one that runs here, or one of our own that is gone again afterwards."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.compose.debian_packages import NotInstallable, install_packages
from tests.compose.docker_commands import DockerCommands, engine_version, find_compose, find_docker
from tests.compose.engine_record import EngineRecord, read_engine_record
from tests.compose.host_network import HostNetwork, put_back, read_host_network
from tests.compose.shell import Shell

from prism.cli.scratch_folder import ScratchFolder, scratch_folder
from prism.common.process import die_with_parent

ENGINE = "dockerd"
READY_DEADLINE_S = 40.0
STOP_DEADLINE_S = 60.0
KILL_DEADLINE_S = 10.0
LOOK_S = 0.1
COMMAND_DEADLINE_S = 20.0
# Each layer would be a whole copy of the files below it: the worker's image alone would fill a disk.
COPYING_DRIVER = "vfs"
CGROUPS = Path("/sys/fs/cgroup")


class NoEngine(Exception):
    """No Docker engine can be had here; the message says why in one line."""


@dataclass(frozen=True)
class Engine:
    """An engine that answers. `shell` reaches it; `own` says that it was started here, which took `ready_s`
    seconds, and `before` how the machine's network was then."""

    shell: Shell
    commands: DockerCommands
    compose: tuple[str, ...]
    version: str
    own: bool
    ready_s: float
    before: HostNetwork | None = None

    async def docker(self, *arguments: str, timeout_s: float = COMMAND_DEADLINE_S) -> str:
        """What `docker ARGUMENTS` prints. Raises CommandFailed."""
        return await self.shell.run(self.commands.docker, *arguments, timeout_s=timeout_s)


@asynccontextmanager
async def docker_engine(shell: Shell, cache: Path) -> AsyncIterator[Engine]:
    """The engine that `docker` reaches here, else one of our own that keeps its images in `cache`.

    Our own needs root, and gets Debian's packages where programs are missing. Afterwards it and all its
    containers are gone, and the machine's network is as before. Raises NoEngine.
    """
    running = await _running(shell)
    programs = {} if running else {ENGINE: "docker.io", "iptables": "iptables", "ip": "iproute2"}
    missing = {package for program, package in programs.items() if not shell.which(program)}
    if await find_docker(shell) is None:
        missing.add("docker.io")
    docker = running or next(iter(shell.which("docker")), "docker")
    if await find_compose(shell, docker) is None:
        missing.add("docker-compose")
    if not running and os.geteuid() != 0:
        raise NoEngine("no Docker engine answers, and only root can start one")
    if missing:
        try:
            await install_packages(shell, missing)
        except NotInstallable as error:
            raise NoEngine(str(error)) from error
    commands = await find_docker(shell)
    if commands is None:
        raise NoEngine("no docker command here can build with BuildKit")
    compose = await find_compose(shell, commands.docker)
    if compose is None:
        raise NoEngine("there is neither `docker compose` nor a docker-compose that works")
    if not commands.with_buildx:
        shell = shell.with_environment(DOCKER_BUILDKIT="1")
    if version := await engine_version(shell, commands.docker):
        yield Engine(shell, commands, compose, version, own=False, ready_s=0.0)
        return
    async with _own_engine(shell, commands, compose, cache) as engine:
        yield engine


async def _running(shell: Shell) -> str | None:
    """A docker that reaches an engine."""
    for docker in shell.which("docker"):
        if await engine_version(shell, docker):
            return docker
    return None


@asynccontextmanager
async def _own_engine(
    shell: Shell, commands: DockerCommands, compose: tuple[str, ...], cache: Path
) -> AsyncIterator[Engine]:
    record = cache.with_suffix(".json")
    if earlier := read_engine_record(record):
        if earlier.run_is_on():
            raise NoEngine(f"another run (process {earlier.run}) uses {cache}")
        print("== putting back what an earlier run, which was killed, has left", flush=True)
        await _tidy(shell, earlier, cache)
    if others := [each.pid for each in psutil.process_iter() if _is_engine(each)]:
        raise NoEngine(f"a Docker engine runs (process {others[0]}) that does not answer here")
    before = await read_host_network(shell)
    # Its path is short: those of sockets are limited.
    with scratch_folder("prism-engine-") as scratch:
        reached = shell.with_environment(DOCKER_HOST=f"unix://{scratch.path}/docker.sock")
        log = scratch.path / "dockerd.log"
        running = EngineRecord.of_this_run(scratch.path, before)
        running.write(record)
        process: asyncio.subprocess.Process | None = None
        try:
            began = time.monotonic()
            process = await _start(shell, scratch, log, cache)
            version = await _until_ready(reached, commands.docker, process, log)
            ready_s = time.monotonic() - began
            yield Engine(reached, commands, compose, version, own=True, ready_s=ready_s, before=before)
        finally:
            if process is not None:
                await _end(process)
            shell.transcript.write(log.read_text(errors="replace") if log.exists() else "")
            await _tidy(shell, running, cache)
            record.unlink()


async def _start(shell: Shell, scratch: ScratchFolder, log: Path, cache: Path) -> asyncio.subprocess.Process:
    folder = scratch.path
    # Not the machine's settings, which may name other folders and sockets.
    settings = folder / "daemon.json"
    settings.write_text("{}")
    with log.open("w") as output:
        return await asyncio.create_subprocess_exec(
            *(ENGINE, "--data-root", str(cache), "--exec-root", str(folder / "exec")),
            *("--pidfile", str(folder / "dockerd.pid"), "--host", f"unix://{folder}/docker.sock"),
            *("--config-file", str(settings)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env=shell.environment,
            # A Ctrl-C at the terminal is ours to handle; our own death is its end too.
            start_new_session=True,
            preexec_fn=die_with_parent,
            # Which keeps the folder until the engine has ended too.
            pass_fds=[scratch.users_fd],
        )


async def _until_ready(shell: Shell, docker: str, process: asyncio.subprocess.Process, log: Path) -> str:
    deadline = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < deadline and process.returncode is None:
        if version := await engine_version(shell, docker):
            driver = await shell.run(docker, "info", "--format", "{{.Driver}}", timeout_s=COMMAND_DEADLINE_S)
            if driver.strip() == COPYING_DRIVER:
                raise NoEngine("dockerd can only copy whole file systems here (storage driver vfs)")
            return version
        await asyncio.sleep(LOOK_S)
    raise NoEngine(f"dockerd does not start: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it says nothing"


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the engine, with its containers."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def engine_processes(folder: Path) -> list[psutil.Process]:
    """Processes of the engine whose run-time files are in `folder`: itself, containerd, its shims."""
    found = []
    for process in psutil.process_iter():
        try:
            named = any(str(folder) in argument for argument in process.cmdline())
            # The folder's own remover waits for the end of all the others.
            if named and process.name() != "sh":
                found.append(process)
        except psutil.Error:
            continue
    return found


async def _end_processes(folder: Path) -> None:
    """Kill what is left of the engine of `folder`, and its containers; it may still be about to end them."""
    deadline = time.monotonic() + STOP_DEADLINE_S
    while any(map(_is_engine, engine_processes(folder))) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S)
    for process in engine_processes(folder):
        with suppress(psutil.NoSuchProcess):
            for each in (*process.children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait(KILL_DEADLINE_S)


def _is_engine(process: psutil.Process) -> bool:
    try:
        return process.name() == ENGINE and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def mounts_within(folder: Path) -> list[str]:
    """Where something is mounted on `folder` or below, the innermost first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return sorted((path for path in mounts if f"{path}/".startswith(f"{folder}/")), reverse=True)


async def _tidy(shell: Shell, ended: EngineRecord, cache: Path) -> None:
    """Remove what an engine has left, but for its images in `cache`."""
    await _end_processes(ended.folder)
    # An engine mounts the folder of its images onto itself.
    for mounted in (*mounts_within(ended.folder), *mounts_within(cache)):
        await shell.run("umount", mounted, timeout_s=COMMAND_DEADLINE_S)
    await put_back(shell, ended.before)
    for cgroup in sorted(_cgroups(), reverse=True):
        # Not those with processes, which are not ours.
        with suppress(OSError):
            cgroup.rmdir()
    shutil.rmtree(ended.folder, ignore_errors=True)


def _cgroups() -> list[Path]:
    """Control groups of Docker engines, in the first or second hierarchy."""
    tops = [CGROUPS / "docker", *CGROUPS.glob("*/docker")]
    return [path for top in tops for path in (top, *top.rglob("*")) if path.is_dir()]
