"""Commands with deadlines, whose output also goes to a transcript."""

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

SHOWN_CHARACTERS = 1500
# Daemons and their tools live there, also where a user's PATH leaves them out.
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"
# What a developer has set for stacks of their own, which must not reach the one under test.
OTHERS_SETTINGS = ("PRISM_", "COMPOSE_")


class CommandFailed(Exception):
    """A command ended with a status other than 0, or not before its deadline; the message ends with what it
    printed last."""


def own_environment() -> dict[str, str]:
    """This process's environment, without settings of other stacks and with the folders of daemons."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS_SETTINGS)}
    return {**kept, "PATH": f"{kept.get('PATH', os.defpath)}:{SYSTEM_FOLDERS}", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True)
class Shell:
    """Runs commands with `environment`, and writes down in `transcript` what they were and said."""

    transcript: TextIO
    environment: Mapping[str, str]

    def with_environment(self, **more: str) -> "Shell":
        """The same, with more in the environment."""
        return Shell(self.transcript, {**self.environment, **more})

    def which(self, command: str) -> list[str]:
        """All programs of that name on the path, each once, the first one first."""
        found: dict[Path, str] = {}
        for folder in self.environment["PATH"].split(":"):
            program = Path(folder) / command
            if program.is_file() and os.access(program, os.X_OK):
                found.setdefault(program.resolve(), str(program))
        return list(found.values())

    async def run(
        self, *arguments: str, timeout_s: float, folder: Path | None = None, stdin: str | None = None
    ) -> str:
        """What the command printed on stdout.

        Raises CommandFailed; the command and all that it has started are then gone, as they are when this is
        cancelled.
        """
        began = time.monotonic()
        self.transcript.write(f"$ {' '.join(arguments)}\n")
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate(None if stdin is None else stdin.encode())
        except TimeoutError as error:
            raise CommandFailed(f"{_brief(arguments)}: no end after {timeout_s:.0f} s") from error
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        output, errors = out.decode(errors="replace"), err.decode(errors="replace")
        self.transcript.write(f"{output}{errors}= {process.returncode}, {time.monotonic() - began:.1f} s\n")
        if process.returncode != 0:
            told = (output + errors).strip()[-SHOWN_CHARACTERS:]
            raise CommandFailed(f"{_brief(arguments)}: status {process.returncode}\n{told}")
        return output

    async def says(self, *arguments: str, timeout_s: float) -> str | None:
        """As `run`, or None where the command fails or does not exist."""
        try:
            return await self.run(*arguments, timeout_s=timeout_s)
        except (CommandFailed, OSError):
            return None


def _brief(arguments: tuple[str, ...]) -> str:
    return " ".join(arguments)[:160]
