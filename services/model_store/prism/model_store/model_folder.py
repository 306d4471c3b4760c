"""From a `model_path` to a folder on this node: a local folder, or a model of the Hugging Face hub."""

import asyncio
import re
import stat
import sys
from pathlib import Path

from prism.common.errors import ErrorCode, PrismError
from prism.model_store.file_errors import reading

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DOWNLOAD_DEADLINE_S = 4 * 3600.0


async def resolve_folder(path: str) -> Path:
    """The folder of the model at `path`; a model of the hub is downloaded first, or only looked up when this
    node has it, which can take long. Cancelling stops a download; the next one goes on from there.

    Raises PrismError(model_failed).
    """
    if is_hub_id(path):
        return await _download(path)
    folder = _local_folder(path)
    if folder is None:
        raise PrismError(
            ErrorCode.MODEL_FAILED,
            f"model folder {path} does not exist on this node; download the model there or "
            "correct model_path in the placement file",
        )
    return folder


async def _download(hub_id: str) -> Path:
    # In a process rather than a thread: a process can be stopped when nobody wants its result any more.
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "prism.model_store.hub_download",
            hub_id,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise _not_fetched(hub_id, f"the download could not be started ({error})") from error
    try:
        async with asyncio.timeout(DOWNLOAD_DEADLINE_S):
            printed, complaints = await process.communicate()
    except TimeoutError as error:
        raise _not_fetched(hub_id, f"not done after {DOWNLOAD_DEADLINE_S / 3600:g} h") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return Path(printed.decode().strip().splitlines()[-1])
    lines = [line.strip() for line in complaints.decode(errors="replace").splitlines() if line.strip()]
    raise _not_fetched(hub_id, (lines or ["no reason given"])[-1][:300])


def _not_fetched(hub_id: str, reason: str) -> PrismError:
    return PrismError(
        ErrorCode.MODEL_FAILED,
        f"{hub_id} is neither a folder on this node nor could it be fetched from the Hugging Face hub: "
        f"{reason}",
        retry=True,
    )


def is_hub_id(path: str) -> bool:
    """Whether `path` would be looked for on the hub."""
    if not HUB_ID.fullmatch(path):
        return False
    try:
        return not is_folder(Path(path))
    except PrismError:
        # It would be below the working folder, which says nothing of the hub.
        return True


def is_folder(path: Path) -> bool:
    """Whether a folder is at `path`. Raises PrismError(model_failed) when that can't be told."""
    with reading(path):
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            # The last: a path that no file can have.
            return False


def _local_folder(path: str) -> Path | None:
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:
        raise PrismError(ErrorCode.MODEL_FAILED, f"{path} is no path on this node: {error}") from error
    return folder if is_folder(folder) else None
