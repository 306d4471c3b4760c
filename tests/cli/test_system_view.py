"""A look at a running system waits for whoever is slow, not only for whoever is quick."""

import asyncio
import json

import pytest
from nats.aio.msg import Msg

from prism.cli import system_view
from prism.cli.system_view import ROLES, SILENCE_S, look
from prism.common import subjects
from prism.common.bus import Bus
from prism.common.messages.load import LoadReport


async def test_a_service_that_is_slow_to_answer_is_not_missing(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_view, "ANSWER_DEADLINE_S", 30.0)

    async def answer(message: Msg) -> None:
        for service, role in ROLES.items():
            await asyncio.sleep(1.5 * SILENCE_S)
            info = {"name": service, "id": role, "version": "1", "metadata": {"instance": role}}
            await bus.client.publish(message.reply, json.dumps(info).encode())
        await bus.publish(subjects.load("gpu_worker"), LoadReport("gpu_worker", "n", "cpu", [0], 1, 0))

    await bus.subscribe("$SRV.INFO", answer)
    await bus.flush()
    view = await look(bus)
    assert [service.role for service in view.services] == list(ROLES.values())
    assert view.problems() == []
