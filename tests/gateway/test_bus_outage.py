"""The gateway outlives its NATS server."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.gateway.conftest import open_stage
from tests.gateway.reading import joined, read_events
from tests.gateway.scripted_worker import Turn

from prism.cli.nats_server import nats_server
from prism.common.bus import connect_bus
from prism.common.messages.models import TokenizerBundle
from prism.gateway.settings import Settings

pytestmark = pytest.mark.core


async def test_stream_and_registry_survive_a_restart_of_the_bus(
    tmp_path: Path, bundle: TokenizerBundle
) -> None:
    go_on = asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids("one "))
        await go_on.wait()
        await turn.send(stage.ids("two"), finish="stop")

    with nats_server(tmp_path) as first:
        port = urlsplit(first.url).port
        assert port is not None
        async with (
            connect_bus(first.url, name="test") as bus,
            # Shorter than the outage: silence of the gateway's own making is no worker's death.
            open_stage(bus, first, bundle, Settings(silence_s=1.5)) as stage,
        ):
            await stage.register("m")
            worker = await stage.worker(script, "m")
            body = {"model": "m", "prompt": "hello", "stream": True}
            request = asyncio.create_task(stage.http.post("/v1/completions", json=body))
            await worker.turns.get()
            seen = 'time_to_first_token_seconds_count{model="m"} 1.0'
            await stage.eventually("/metrics", lambda answer: seen in answer.text)
            first.stop()
            await stage.eventually("/readyz", lambda answer: answer.status_code == 503)
            await asyncio.sleep(2.0)
            with nats_server(tmp_path, port=port):
                await stage.eventually("/readyz", lambda answer: answer.status_code == 200)
                go_on.set()
                events = read_events((await asyncio.wait_for(request, 10)).text)
                assert joined(events) == "one two"
                assert worker.turns.qsize() == 0
                await stage.register("later")
                await stage.ready("m")


async def test_the_silence_of_a_bus_that_is_away_is_no_loss_of_a_worker(
    tmp_path: Path, bundle: TokenizerBundle
) -> None:
    go_on = asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.send(stage.ids("one "))
        await go_on.wait()
        await turn.send(stage.ids("two"), finish="stop")

    with nats_server(tmp_path) as first:
        port = urlsplit(first.url).port
        assert port is not None
        async with (
            connect_bus(first.url, name="test") as bus,
            open_stage(bus, first, bundle, Settings(accept_s=2.0, stall_s=2.0, max_losses=0)) as stage,
        ):
            await stage.register("m")
            worker = await stage.worker(script, "m")
            body = {"model": "m", "prompt": "hello", "stream": True}
            request = asyncio.create_task(stage.http.post("/v1/completions", json=body))
            await worker.turns.get()
            seen = 'time_to_first_token_seconds_count{model="m"} 1.0'
            await stage.eventually("/metrics", lambda answer: seen in answer.text)
            first.stop()
            await stage.eventually("/readyz", lambda answer: answer.status_code == 503)
            # Three times what a worker may be silent.
            await asyncio.sleep(6.0)
            bus.on_return.append(go_on.set)
            with nats_server(tmp_path, port=port):
                events = read_events((await asyncio.wait_for(request, 20)).text)
            assert joined(events) == "one two"
            assert worker.turns.qsize() == 0


async def test_a_request_whose_last_frame_the_bus_lost_is_made_anew_at_once(
    tmp_path: Path, bundle: TokenizerBundle
) -> None:
    async def script(turn: Turn) -> None:
        if len(turn.request.input_ids) == prompt_tokens:
            await turn.send(stage.ids("one "))
            # Its end went down with the server, so there is no frame to send once the server is back.
        else:
            await turn.send(stage.ids("two"), finish="stop")

    with nats_server(tmp_path) as first:
        port = urlsplit(first.url).port
        assert port is not None
        async with (
            connect_bus(first.url, name="test") as bus,
            open_stage(bus, first, bundle, Settings(stall_s=1000)) as stage,
        ):
            prompt_tokens = len(stage.ids("hello"))
            await stage.register("m")
            worker = await stage.worker(script, "m")
            body = {"model": "m", "prompt": "hello", "stream": True}
            request = asyncio.create_task(stage.http.post("/v1/completions", json=body))
            seen = 'time_to_first_token_seconds_count{model="m"} 1.0'
            await stage.eventually("/metrics", lambda answer: seen in answer.text)
            first.stop()
            with nats_server(tmp_path, port=port):
                events = read_events((await asyncio.wait_for(request, 20)).text)
            assert joined(events) == "one two"
            assert worker.turns.qsize() == 2
