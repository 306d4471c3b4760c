"""A client's command line as a process, with a deadline; it looks for nothing outside this machine."""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

DEADLINE_S = 180.0
SHOWN_CHARACTERS = 6000

# Clients that find no answer would ask a model hub for tokenizers, and the web for a list of prices.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


async def run_client(command: Sequence[str], variables: Mapping[str, str], folder: Path) -> str:
    """Run `command` in `folder` with environment `variables` on top: what it printed.

    Raises AssertionError, with the end of that, when it fails or is not done within DEADLINE_S.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**os.environ, **OFFLINE, **variables},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        # A group of its own, so that its workers end with it.
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            printed, _ = await process.communicate()
    except TimeoutError as error:
        raise AssertionError(f"{command[0]} is not done after {DEADLINE_S:.0f} s") from error
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    text = printed.decode(errors="replace")
    assert process.returncode == 0, f"status {process.returncode}: {text[-SHOWN_CHARACTERS:]}"
    return text
