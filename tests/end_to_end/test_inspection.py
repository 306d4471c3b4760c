"""What docs/inspection.md says that the NATS CLI prints is what is on the bus, and `prism` says the same.

The look-ups are those that the NATS CLI makes: a subscription, a request, a key of a bucket.
"""

import asyncio
import contextlib
import json
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import nats.js.errors
import pytest
from nats.aio.msg import Msg
from tests.end_to_end.observing import DEADLINE_S, Watcher, generate, put_to_sleep

from prism.cli.nats_server import NatsServer
from prism.cli.system import RunningSystem
from prism.common import subjects
from prism.common.bus import Bus, connect_bus
from prism.common.identity import node_name
from prism.common.messages.models import ModelState

DOCS = Path(__file__).parents[2] / "docs" / "inspection.md"
SLEEPER, OTHERS = "tiny-qwen3", ["tiny-llama", "tiny-llama-big"]
OF_A_MODEL_ELSEWHERE = {".models[].places[].need_bytes", ".models[].places[].seconds"}
"""What an explanation tells only of places where the model is not."""
EXAMPLE = re.compile(r"```sh\n(nats [^\n]+)\n```\n```(?:json|text)\n(.+?)\n```", re.DOTALL)


def documented() -> list[tuple[list[str], str]]:
    """Each command of the docs, split, and what it prints."""
    text = DOCS.read_text().replace("$(hostname)", node_name())
    return [(shlex.split(command)[1:], printed) for command, printed in EXAMPLE.findall(text)]


def paths(value: Any, at: str = "") -> set[str]:
    """Where something is in a JSON value; the elements of a list are in one place."""
    if isinstance(value, dict):
        return {at}.union(*(paths(inner, f"{at}.{key}") for key, inner in value.items()))
    if isinstance(value, list):
        return {at}.union(*(paths(inner, f"{at}[]") for inner in value))
    return {at}


class Overheard:
    """Everything that was said on the bus."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []
        self._more = asyncio.Event()

    async def take(self, message: Msg) -> None:
        self.messages.append((message.subject, json.loads(message.data or b"null")))
        self._more.set()

    async def until_there_are(self, pattern: str, wanted: set[str]) -> None:
        """Wait until messages on `pattern` had all that is `wanted`."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not wanted <= self.paths(pattern):
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            pytest.fail(f"never on {pattern}: {sorted(wanted - self.paths(pattern))}")

    def paths(self, pattern: str) -> set[str]:
        """Where something is in messages on `pattern`."""
        wanted = pattern.replace(">", "*")
        return set[str]().union(*(paths(said) for subject, said in self.messages if fnmatch(subject, wanted)))


@asynccontextmanager
async def overhearing(bus: Bus) -> AsyncIterator[Overheard]:
    overheard = Overheard()
    subscription = await bus.subscribe(f"{subjects.PREFIX}.>", overheard.take, inline=True)
    await bus.flush()
    yield overheard
    await subscription.unsubscribe()


async def keys(bus: Bus, bucket: str) -> list[str]:
    """The keys that have a value. (nats-py's own list can miss some: its mark of the end overtakes them.)"""
    kv = await bus.jetstream.key_value(bucket)
    stream = await bus.jetstream.stream_info(f"KV_{bucket}", subjects_filter=">")
    found = []
    for subject in stream.state.subjects or {}:
        with contextlib.suppress(nats.js.errors.KeyNotFoundError):
            found.append((await kv.get(subject.removeprefix(f"$KV.{bucket}."))).key)
    return [key for key in found if key is not None]


async def lookup(bus: Bus, command: list[str]) -> str:
    """What `nats COMMAND` would print, for a request or a bucket."""
    match command:
        case ["req", subject, payload, "--raw"]:
            return (await bus.client.request(subject, payload.encode(), timeout=5)).data.decode()
        case ["req", subject, payload, "--timeout", limit, "--raw"]:
            seconds = float(limit.removesuffix("s"))
            return (await bus.client.request(subject, payload.encode(), timeout=seconds)).data.decode()
        case ["kv", "get", bucket, key, "--raw"]:
            return ((await (await bus.jetstream.key_value(bucket)).get(key)).value or b"").decode()
        case ["kv", "ls", bucket]:
            return "\n".join(sorted(await keys(bus, bucket)))
    raise AssertionError(f"the docs have a command that is not tried here: nats {shlex.join(command)}")


async def leave_a_stream(client: httpx.AsyncClient, model: str) -> None:
    body = {"model": model, "prompt": "Hello", "max_tokens": 500, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        await anext(answer.aiter_lines())


@pytest.fixture
async def bus(system: RunningSystem) -> AsyncIterator[Bus]:
    async with connect_bus(system.nats_url, name="test") as connected:
        yield connected


async def prism(system: RunningSystem, *arguments: str) -> tuple[int, str]:
    """Status and output of a `prism` command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.cli.main", *arguments, "--nats", system.nats_url),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE_S):
        printed, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode()


async def test_messages_on_the_bus_are_those_of_the_docs(
    bus: Bus, client: httpx.AsyncClient, watcher: Watcher
) -> None:
    listened = {command[1]: printed for command, printed in documented() if command[0] == "sub"}
    assert len(listened) >= 7
    async with overhearing(bus) as overheard:
        for model in (SLEEPER, *OTHERS):
            await generate(client, model, [5, 6, 7], 2)
        await put_to_sleep(client, watcher, SLEEPER, OTHERS)
        await generate(client, SLEEPER, [5, 6, 7], 4)
        await put_to_sleep(client, watcher, "tiny-llama", [SLEEPER, "tiny-llama-big"])
        await leave_a_stream(client, "tiny-llama")
        for pattern, printed in listened.items():
            wanted = paths(json.loads(printed))
            await overheard.until_there_are(pattern, wanted)
    kinds = {subject.split(".")[2] for subject, _ in overheard.messages} - {"scheduler", "store"}
    assert kinds <= {pattern.split(".")[2] for pattern in listened}, "the docs show every kind of message"


async def test_services_and_buckets_answer_as_the_docs_say(bus: Bus, client: httpx.AsyncClient) -> None:
    asked = [(command, printed) for command, printed in documented() if command[0] != "sub"]
    assert len(asked) >= 10
    await generate(client, "tiny-llama", [5, 6, 7], 2)
    for command, printed in asked:
        answer = await lookup(bus, command)
        if command[1] == "ls":
            described = {line.partition(".worker-")[0] for line in printed.splitlines()}
            there = {line.partition(".worker-")[0] for line in answer.splitlines()}
            assert there == described if command[2] == subjects.BUCKET_MODELS else there & described
        else:
            described = paths(json.loads(printed))
            assert described - OF_A_MODEL_ELSEWHERE <= paths(json.loads(answer)), command


async def test_prism_status_says_what_the_services_say(bus: Bus, system: RunningSystem) -> None:
    status, printed = await prism(system, "status", "--json")
    view = json.loads(printed)
    assert (status, view["problems"]) == (0, [])
    for service in view["services"]:
        name = f"prism-{service['role'].replace('_', '-')}"
        told = json.loads(await lookup(bus, ["req", f"$SRV.PING.{name}", "", "--raw"]))
        assert told["metadata"] == {"instance": service["instance"], **service["metadata"]}
    leader = json.loads(
        await lookup(bus, ["kv", "get", subjects.BUCKET_LEADER, subjects.LEADER_KEY, "--raw"])
    )
    assert view["plan"]["leader"] == leader["instance"]
    _, for_people = await prism(system, "status")
    for service in view["services"]:
        assert service["instance"] in for_people


async def test_prism_models_says_what_buckets_and_reports_say(
    bus: Bus, system: RunningSystem, client: httpx.AsyncClient, watcher: Watcher
) -> None:
    await generate(client, "tiny-llama", [5, 6, 7], 2)
    await watcher.until_state("tiny-llama", ModelState.ACTIVE)
    status, printed = await prism(system, "models", "--json")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert status == 0
    specs = (await lookup(bus, ["kv", "ls", subjects.BUCKET_MODELS])).splitlines()
    assert [row["model"] for row in rows] == [key[5:] for key in specs if key.startswith("spec.")]
    routes = set((await lookup(bus, ["kv", "ls", subjects.BUCKET_ROUTES])).splitlines())
    assert {f"{row['model']}.{row['worker']}" for row in rows if row.get("routed")} == routes
    assert {row["model"]: row["state"] for row in rows} == {
        row["model"]: watcher.state(row["model"]).value for row in rows
    }


async def test_prism_events_prints_what_happens(system: RunningSystem, client: httpx.AsyncClient) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prism.cli.main", "events", "--nats", system.nats_url, "--json"),
        *("--model", SLEEPER, "--count", "1"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE_S):
        assert subjects.events() in (await process.stderr.readline()).decode()
        while process.returncode is None:
            for model in (SLEEPER, *OTHERS):
                await generate(client, model, [5, 6, 7], 2)
        printed, _ = await process.communicate()
    assert json.loads(printed)["model"] == SLEEPER


@pytest.mark.parametrize("command", ["status", "models"])
async def test_a_bus_without_prism_and_no_bus_at_all_are_told(command: str, fresh_nats: NatsServer) -> None:
    nowhere = "nats://127.0.0.1:1"
    for url, told in ((nowhere, f"no NATS server at {nowhere}"), (fresh_nats.url, "no Prism is on the bus")):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "prism.cli.main", command, "--nats", url), stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(DEADLINE_S):
            _, complaint = await process.communicate()
        assert process.returncode == 1
        assert told in complaint.decode()
