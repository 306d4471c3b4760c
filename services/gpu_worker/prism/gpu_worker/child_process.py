"""The end of a child that serves until its stdin ends."""

import asyncio
import contextlib


async def end_child(process: asyncio.subprocess.Process, grace_s: float = 0.0) -> None:
    """Have `process` end by itself within `grace_s` seconds, else kill it; it is gone when this returns."""
    try:
        if grace_s and process.returncode is None and process.stdin is not None:
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
