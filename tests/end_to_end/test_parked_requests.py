"""Requests for a sleeping model wait, and wake it once."""

import asyncio

import httpx
import pytest
from nats.aio.msg import Msg
from tests.end_to_end.observing import Watcher, generate, put_to_sleep

from prism.cli.system import RunningSystem
from prism.common.bus import connect_bus
from prism.common.messages.codec import decode
from prism.common.messages.placement import Command, CommandKind
from prism.common.subjects import command

pytestmark = pytest.mark.engine

SLEEPER = "tiny-llama"


async def test_two_hundred_requests_to_a_sleeping_model_wake_it_once(
    system: RunningSystem, client: httpx.AsyncClient, watcher: Watcher
) -> None:
    await generate(client, SLEEPER, [1, 2, 3], 2)
    await put_to_sleep(client, watcher, SLEEPER, ["tiny-qwen3", "tiny-llama-big"])
    woken = watcher.count("waking", SLEEPER)
    commands: list[Command] = []

    async def on_command(message: Msg) -> None:
        commands.append(decode(message.data, Command))

    async with connect_bus(system.nats_url, name="test commands") as bus:
        await bus.subscribe(command("*"), on_command, inline=True)
        await bus.flush()
        outputs = await asyncio.gather(*(generate(client, SLEEPER, [3, 4, 5], 2) for _ in range(200)))
        await bus.flush()
    assert len(outputs) == 200
    assert all(output == outputs[0] for output in outputs)
    wakes = [
        sent for sent in commands if sent.kind is CommandKind.ACTIVATE and sent.spec.model_name == SLEEPER
    ]
    assert len(wakes) == 1
    assert watcher.count("waking", SLEEPER) == woken + 1
