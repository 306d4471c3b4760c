"""NVIDIA's Multi-Process Service for the length of a measurement, started as a user's process."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
DEADLINE_S = 20.0


class MpsUnavailable(Exception):
    """It cannot be started here; says why."""


@contextlib.contextmanager
def mps_daemon(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A daemon of our own with its pipes in `folder`; yields what its clients must find in their environment.

    Raises MpsUnavailable.
    """
    control = shutil.which(CONTROL)
    if control is None:
        raise MpsUnavailable(f"there is no {CONTROL}")
    pipes, logs = folder / "pipes", folder / "logs"
    pipes.mkdir(parents=True)
    logs.mkdir()
    clients = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(logs)}
    variables = {**environment, **clients}
    try:
        subprocess.run([control, "-d"], env=variables, check=True, capture_output=True, timeout=DEADLINE_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise MpsUnavailable(f"{CONTROL} -d: {error}") from error
    try:
        yield clients
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run([control], env=variables, input=b"quit\n", capture_output=True, timeout=DEADLINE_S)
