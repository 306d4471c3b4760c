"""Looking at a running system from outside: what it tells on the bus, what the kernel says of its engines."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
from nats.aio.msg import Msg
from tests.processes import command_line, descendants

from prism.cli.system import RunningSystem
from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.codec import decode
from prism.common.messages.events import Event
from prism.common.messages.load import LoadReport
from prism.common.messages.models import ModelState

DEADLINE_S = 90.0


class Watcher:
    """What the system says of itself on the bus, to be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reports: list[LoadReport] = []
        self._changed = asyncio.Event()

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        self._wake()

    def on_report(self, report: LoadReport) -> None:
        self.reports.append(report)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at after every event and report."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await self._changed.wait()

    def state(self, model: str) -> ModelState:
        """The state of `model` in the newest report."""
        for load in self.reports[-1].models if self.reports else []:
            if load.model == model:
                return load.state
        return ModelState.COLD

    async def until_state(self, model: str, state: ModelState) -> None:
        """Wait until the worker reports `model` to be in `state`."""
        await self.until(lambda: self.state(model) is state)

    def count(self, kind: str, model: str) -> int:
        """Events of `kind` about `model` so far."""
        return sum(1 for event in self.events if event.kind == kind and event.model == model)


@asynccontextmanager
async def watching(bus: Bus) -> AsyncIterator[Watcher]:
    watcher = Watcher()

    async def on_event(message: Msg) -> None:
        watcher.on_event(decode(message.data, Event))

    async def on_load(message: Msg) -> None:
        watcher.on_report(decode(message.data, LoadReport))

    subscriptions = [
        await bus.subscribe(subjects.events(), on_event, inline=True),
        await bus.subscribe(subjects.load("*"), on_load, inline=True),
    ]
    await bus.flush()
    try:
        yield watcher
    finally:
        for subscription in subscriptions:
            await subscription.unsubscribe()


def engine_processes(system: RunningSystem) -> dict[str, psutil.Process]:
    """The engine host processes of the worker, by model."""
    worker = system.services["gpu_worker"].process
    assert worker is not None
    found = {}
    for process in descendants(worker.pid):
        title = " ".join(command_line(process)).split()
        # A title that is just being written may lack the model.
        if title[:1] == ["prism-engine"] and len(title) > 1:
            found[title[1]] = process
    return found


def arena_bytes(pid: int) -> int:
    """Resident bytes of a process's mappings of weights and KV cache, from the kernel."""
    found = 0
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return 0
    in_arena = False
    for line in lines:
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            in_arena = "/memfd:prism-weights" in line or "/memfd:prism-kv" in line
        elif in_arena and first == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


async def generate(client: httpx.AsyncClient, model: str, ids: list[int], tokens: int) -> list[int]:
    """Greedy output token ids for a prompt of token ids, through the gateway."""
    response = await client.post(
        "/generate",
        json={
            "model": model,
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens},
        },
    )
    assert response.status_code == 200, response.text
    output: list[int] = response.json()["output_ids"]
    return output


async def put_to_sleep(client: httpx.AsyncClient, watcher: Watcher, model: str, others: list[str]) -> None:
    """Have `model` sleep by asking for the others until it has made room for them."""
    async with asyncio.timeout(DEADLINE_S):
        while watcher.state(model) is not ModelState.DOZING:
            for other in others:
                await generate(client, other, [5, 6, 7], 2)
            seen = len(watcher.reports)
            await watcher.until(lambda seen=seen: len(watcher.reports) > seen)  # type: ignore[misc]
