"""The two that are compared: plain SGLang, and a model of a running system. Both generate batches."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import httpx
import msgspec

from prism.bench.decode.plain_engine import Batch, Generated, PlainSettings, generated, request_of
from prism.bench.gpu_processes import gpu_environment

START_DEADLINE_S = 300.0
BATCH_DEADLINE_S = 180.0
END_DEADLINE_S = 20.0
LONGEST_LINE_BYTES = 1 << 28


class Side(Protocol):
    """Somebody who generates."""

    async def generate(self, batch: Batch) -> Generated:
        """All answers, and the time that they took. Raises RuntimeError with what went wrong."""
        ...


class PlainSide:
    """SGLang's Engine in a process of its own. Made by `plain_side`."""

    def __init__(self, process: asyncio.subprocess.Process, settings: PlainSettings) -> None:
        self._process = process
        self._starting = asyncio.create_task(self._ask(settings, START_DEADLINE_S), name="plain start")

    async def started(self) -> None:
        """Wait until it can generate."""
        await self._starting

    async def no_longer(self) -> None:
        """Have nobody wait for its start any more."""
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)

    async def generate(self, batch: Batch) -> Generated:
        """See `Side`. After `started`."""
        return msgspec.json.decode(await self._ask(batch, BATCH_DEADLINE_S), type=Generated)

    async def _ask(self, what: msgspec.Struct, deadline_s: float) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(what) + b"\n")
        async with asyncio.timeout(deadline_s):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("plain SGLang ended; what it said stands in the cell's log")
        return line


@asynccontextmanager
async def plain_side(settings: PlainSettings, log: Path) -> AsyncIterator[PlainSide]:
    """Plain SGLang that starts, without kvcached; its process group is gone at the end."""
    own = {"KVCACHED_AUTOPATCH": "0", "ENABLE_KVCACHED": "false"}
    environment = {**os.environ, **own, **gpu_environment()}
    if settings.device == "cpu":
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("a") as lines:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "prism.bench.decode.plain_engine",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=lines,
            env=environment,
            limit=LONGEST_LINE_BYTES,
            start_new_session=True,
        )
        side = PlainSide(process, settings)
        try:
            yield side
        finally:
            await side.no_longer()
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_DEADLINE_S):
                    await process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


class GatewaySide:
    """A model behind a gateway."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http = http
        self._model = model

    async def generate(self, batch: Batch) -> Generated:
        """See `Side`."""
        body = {**request_of(batch), "model": self._model}
        began = time.perf_counter()
        answer = await self._http.post("/generate", json=body, timeout=BATCH_DEADLINE_S)
        seconds = time.perf_counter() - began
        if answer.status_code != 200:
            raise RuntimeError(f"{self._model} answered {answer.status_code}: {answer.text}")
        return generated(answer.json(), seconds)
