"""What the test has left on its machine: of the stack in the engine, of the engine in the system."""

from pathlib import Path

from tests.compose.docker_engine import Engine, engine_processes, mounts_within
from tests.compose.host_network import HostNetwork, differences, read_host_network
from tests.compose.shell import Shell
from tests.compose.stack import PROJECT

KINDS = {
    "container": ("ps", "--all", "--format", "{{.Names}}"),
    "network": ("network", "ls", "--format", "{{.Name}}"),
    "volume": ("volume", "ls", "--format", "{{.Name}}"),
}


async def left_in_engine(engine: Engine) -> list[str]:
    """Containers, networks and volumes of the stack. Raises CommandFailed."""
    found = []
    for kind, arguments in KINDS.items():
        told = await engine.docker(*arguments, "--filter", f"label=com.docker.compose.project={PROJECT}")
        found += [f"{kind} {name}" for name in told.split()]
    return found


async def left_in_system(shell: Shell, before: HostNetwork, cache: Path) -> list[str]:
    """Processes and mounts of an engine that kept its images in `cache`, and changes in the network."""
    processes = [f"process {each.pid}: {' '.join(each.cmdline())[:120]}" for each in engine_processes(cache)]
    mounted = [f"mount {path}" for path in mounts_within(cache)]
    return [*processes, *mounted, *differences(before, await read_host_network(shell))]
