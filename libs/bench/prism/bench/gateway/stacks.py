"""What is measured: Prism, LiteLLM's proxy, SGLang's router, and the backend alone, each on loopback.

Every stack says the same text at the same pace; what differs is what stands between backend and client.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from prism.bench.gateway.cores import give_gateway_its_core
from prism.bench.gateway.openai_backend import MODEL as BACKEND_MODEL
from prism.cli.system import SystemSettings, running_system
from prism.common.errors import ErrorCode, PrismError

READY_DEADLINE_S = 90.0
END_DEADLINE_S = 10.0
PRISM_MODEL = "tiny-llama"
MOST_RUNNING = 1024


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack: where clients ask for which models, and the process that is the gateway."""

    name: str
    host: str
    port: int
    models: tuple[str, ...]
    gateway: psutil.Process

    def cpu_s(self) -> float:
        """CPU seconds that the gateway and its children have used so far, in user and kernel."""
        total = 0.0
        for process in [self.gateway, *self.gateway.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def prism_stack(
    folder: Path, models: Path, *, step_ms: float, coalesce_ms: float, workers: int = 1
) -> AsyncIterator[Stack]:
    """The whole system with `workers` simulated workers, one model each."""
    names = [PRISM_MODEL] + [f"{PRISM_MODEL}-{index}" for index in range(1, workers)]
    placement = [
        {
            "model_name": name,
            "model_path": str(models / PRISM_MODEL),
            "init_placements": [{"gpu_ids": [index], "on": True, "max_memory_pool_size": 0.1}],
        }
        for index, name in enumerate(names)
    ]
    file = _written(folder / "prism.json", placement)
    environment = {
        "PRISM_SIMULATED_SCRIPT": "stamped",
        "PRISM_SIMULATED_DECODE_STEP_MS": str(step_ms),
        "PRISM_SIMULATED_PREFILL_TOKENS_PER_S": "0",
        "PRISM_SIMULATED_KV_BYTES_PER_TOKEN": "16",
        "PRISM_MAX_RUNNING_REQUESTS": str(MOST_RUNNING),
        "PRISM_COALESCE_MS": str(coalesce_ms),
    }
    settings = SystemSettings(
        placement=file,
        worker_memory_gb=1.0,
        device="simulated",
        log_level="WARNING",
        drain_s=2.0,
        workers=workers,
        environment=environment,
    )

    async with running_system(settings, _tell) as system:
        await _until_ready(system.gateway_url, names)
        process = system.of("gateway")[0].process
        assert process is not None
        gateway = psutil.Process(process.pid)
        give_gateway_its_core(gateway)
        url = httpx.URL(system.gateway_url)
        yield Stack("prism", url.host, url.port or 80, tuple(names), gateway)


def _written(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def _tail(file: Path) -> str:
    return file.read_text(errors="replace")[-500:]


def _tell(service: str, line: str) -> None:
    if not any(usual in line for usual in ("SIMULATED device", "gateway ready", "no longer leads")):
        print(f"  {service}: {line}", file=sys.stderr)


async def _until_ready(url: str, names: Sequence[str]) -> None:
    async with asyncio.timeout(READY_DEADLINE_S), httpx.AsyncClient(base_url=url, timeout=5) as client:
        while True:
            told = (await client.get("/v1/models")).json()["data"]
            ready = {model["id"] for model in told if model["state"] == "ready"}
            if ready >= set(names):
                if any(model["devices"] != ["simulated"] for model in told):
                    raise PrismError(ErrorCode.INTERNAL, "a model is not served by the simulated device")
                return
            await asyncio.sleep(0.1)


class OpenAIBackend:
    """The running backend of the other stacks."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.port = port
        self.process = process

    async def pace(self, step_ms: float) -> None:
        """Set the time between two tokens of a stream."""
        async with httpx.AsyncClient(timeout=5) as client:
            answer = await client.post(f"http://127.0.0.1:{self.port}/pace", json={"step_ms": step_ms})
            answer.raise_for_status()

    def alone(self) -> Stack:
        """Clients talk to the backend itself: what the measuring costs."""
        return Stack("direct", "127.0.0.1", self.port, (BACKEND_MODEL,), self.process)


@asynccontextmanager
async def openai_backend() -> AsyncIterator[OpenAIBackend]:
    """A backend of `openai_backend`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "prism.bench.gateway.openai_backend",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(READY_DEADLINE_S):
            port = int(await process.stdout.readline())
        yield OpenAIBackend(port, psutil.Process(process.pid))
    finally:
        await _end(process)


@asynccontextmanager
async def litellm_stack(python: Path, folder: Path, backend: OpenAIBackend) -> AsyncIterator[Stack]:
    """LiteLLM's proxy with one worker process, logging as little as it can."""
    parameters = {
        "model": f"openai/{BACKEND_MODEL}",
        "api_base": f"http://127.0.0.1:{backend.port}/v1",
        "api_key": "sk-unused",
    }
    content = {
        "model_list": [{"model_name": BACKEND_MODEL, "litellm_params": parameters}],
        "litellm_settings": {"telemetry": False, "set_verbose": False},
    }
    config = _written(folder / "litellm.yaml", content)  # JSON is YAML
    port = free_port()
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        # No key to check: what costs LiteLLM least.
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    arguments = [
        str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1",
        "--port", str(port), "--num_workers", "1",
    ]  # fmt: skip
    async with _proxy("litellm", arguments, environment, port, "/health/liveliness", folder) as stack:
        yield stack


@asynccontextmanager
async def router_stack(python: Path, folder: Path, backend: OpenAIBackend) -> AsyncIterator[Stack]:
    """SGLang's router in front of the backend."""
    port = free_port()
    arguments = [
        str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", f"http://127.0.0.1:{backend.port}", "--policy", "round_robin",
        "--prometheus-port", str(free_port()), "--log-level", "error",
    ]  # fmt: skip
    async with _proxy("router", arguments, {}, port, "/health", folder) as stack:
        yield stack


@asynccontextmanager
async def _proxy(
    name: str, arguments: list[str], environment: dict[str, str], port: int, health: str, folder: Path
) -> AsyncIterator[Stack]:
    without_ours = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (folder / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            env={**without_ours, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        await _until_answers(process, f"http://127.0.0.1:{port}{health}", folder / f"{name}.log")
        gateway = psutil.Process(process.pid)
        give_gateway_its_core(gateway)
        yield Stack(name, "127.0.0.1", port, (BACKEND_MODEL,), gateway)
    finally:
        await _end(process)


async def _until_answers(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    async with asyncio.timeout(READY_DEADLINE_S), httpx.AsyncClient(timeout=5) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).status_code == 200:
                    return
            if process.returncode is not None:
                raise PrismError(ErrorCode.INTERNAL, f"{url} ended with {process.returncode}: {_tail(log)}")
            await asyncio.sleep(0.2)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    elif process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(END_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
