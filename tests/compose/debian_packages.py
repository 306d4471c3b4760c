"""Debian's packages for what is missing: an engine and compose, in the versions of the distribution."""

import os
from collections.abc import Iterable

from tests.compose.shell import CommandFailed, Shell

UPDATE_DEADLINE_S = 120.0
INSTALL_DEADLINE_S = 300.0


class NotInstallable(Exception):
    """The packages cannot be had here; the message says why in one line."""


async def install_packages(shell: Shell, packages: Iterable[str]) -> None:
    """Install `packages` with apt-get, and say so. Raises NotInstallable."""
    names = sorted(packages)
    if os.geteuid() != 0:
        raise NotInstallable(f"{', '.join(names)} not installed, and only root can")
    if not shell.which("apt-get"):
        raise NotInstallable(f"{', '.join(names)} not installed, and there is no apt-get to do so")
    print(f"== installing Debian packages: {' '.join(names)}", flush=True)
    quiet = shell.with_environment(DEBIAN_FRONTEND="noninteractive")
    try:
        await quiet.run("apt-get", "update", "--quiet", timeout_s=UPDATE_DEADLINE_S)
        await quiet.run(
            *("apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *names),
            timeout_s=INSTALL_DEADLINE_S,
        )
    except CommandFailed as error:
        last = str(error).splitlines()[-1]
        raise NotInstallable(f"{', '.join(names)} cannot be installed: {last}") from error
