"""Which of the programs on this machine are used: a docker that can build with BuildKit, and a compose."""

import re
from dataclasses import dataclass

from tests.compose.shell import Shell

ASK_DEADLINE_S = 15.0
# The last command line tools that drive BuildKit by themselves; later ones need the buildx plugin for it.
LAST_WITHOUT_BUILDX = 22


@dataclass(frozen=True)
class DockerCommands:
    """Beginnings of command lines: `docker` for anything, `build` for a build with BuildKit whose result the
    engine keeps."""

    docker: str
    build: tuple[str, ...]

    @property
    def with_buildx(self) -> bool:
        """Whether builds go through the buildx plugin."""
        return "buildx" in self.build


async def find_docker(shell: Shell) -> DockerCommands | None:
    """A docker that can build with BuildKit; several may be installed, not all of them complete."""
    for docker in shell.which("docker"):
        if await shell.says(docker, "buildx", "version", timeout_s=ASK_DEADLINE_S) is not None:
            # Other builders see no local base image.
            return DockerCommands(docker, (docker, "buildx", "--builder", "default", "build", "--load"))
        version = await shell.says(docker, "--version", timeout_s=ASK_DEADLINE_S)
        found = re.search(r"version (\d+)\.", version or "")
        if found and int(found.group(1)) <= LAST_WITHOUT_BUILDX:
            return DockerCommands(docker, (docker, "build"))
    return None


async def find_compose(shell: Shell, docker: str) -> tuple[str, ...] | None:
    """The beginning of a command line for compose: version 2 where it is there, else 1."""
    if await shell.says(docker, "compose", "version", timeout_s=ASK_DEADLINE_S) is not None:
        return (docker, "compose")
    for compose in shell.which("docker-compose"):
        if await shell.says(compose, "version", timeout_s=ASK_DEADLINE_S) is not None:
            return (compose,)
    return None


async def engine_version(shell: Shell, docker: str) -> str | None:
    """The version of the engine that answers `docker`, None when none does."""
    version = await shell.says(docker, "version", "--format", "{{.Server.Version}}", timeout_s=ASK_DEADLINE_S)
    return version.strip() if version else None
